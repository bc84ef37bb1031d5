"""What the libraries say of themselves does not help anybody; errors still come through."""

import logging
import warnings

import transformers


def quiet() -> None:
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module="torch|peft|transformers|deepspeed|accelerate")
    transformers.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    for name in ("DeepSpeed", "deepspeed", "accelerate", "torch.distributed", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)
