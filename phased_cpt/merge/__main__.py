"""A merge as a process of its own: the job comes in as JSON, and how it ended goes out the same way.

python -m phased_cpt.merge < job.json
"""

import json
import os
import sys
import traceback
from typing import NoReturn

from phased_cpt.errors import PhasedCptError
from phased_cpt.launchers.parents import die_with_the_parent
from phased_cpt.merging import MergeJob
from phased_cpt.model.quiet import quiet
from phased_cpt.progress import Bar
from phased_cpt.run_dir import disk_failed


def main() -> NoReturn:
    die_with_the_parent()
    job = MergeJob.parse(sys.stdin.read())
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints is no answer
    quiet()
    from phased_cpt.merge.story import merge

    try:
        merge(job, Bar())
        word: dict[str, object] = {"done": True}
        code = 0
    except PhasedCptError as error:
        code = error.exit_code
        word = {"message": str(error), "exit_code": code}
    except OSError as error:
        code = 1
        word = {"message": str(disk_failed(error, None, "no merged model is left half made")), "exit_code": code}
    except BaseException as error:
        traceback.print_exc()
        code = 1
        word = {"message": f"the merge has failed: {type(error).__name__}: {error}", "exit_code": code}
    answer.write(json.dumps(word) + "\n")
    answer.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
