"""How long a person waits for `phased-cpt prepare`, beside how people pack a corpus with Hugging Face libraries.

    python benchmarks/prepare.py [--megabytes 100] [--repeats 3] [--tokenizer PATH] [--work DIR]

It needs `trl`. The contestants take turns, each a fresh process with an empty cache; what counts is the ratio. The
peers run at their best: only `input_ids` are kept, and each has the number of processes that was fastest here.
"""

import argparse
import hashlib
import importlib.metadata
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
SAMPLE_TOKENIZER = REPOSITORY / "dataset" / "sample" / "tokenizer.json"
END = "<|endoftext|>"
ROW_TOKENS = 2048
MB = 10**6
OURS = "phased-cpt prepare"
PEERS = {"trl": "datasets + TRL bfd_split", "group_texts": "datasets + group_texts"}


# The corpus and the tokenizer: built once, the same for everybody.


def source_files() -> Iterator[tuple[str, Path]]:
    """The standard library's sources in order, then those of site-packages shuffled, so that any part is a mix."""
    stdlib, site = Path(sysconfig.get_path("stdlib")), Path(sysconfig.get_path("purelib"))
    packages = {"site-packages", "dist-packages"}
    of_stdlib = (file for file in sorted(stdlib.rglob("*.py")) if not packages & {*file.parts})
    of_site = sorted(site.rglob("*.py"))
    random.Random(0).shuffle(of_site)  # a benchmark that repeats itself, not a secret
    for label, root, files in (("stdlib", stdlib, of_stdlib), ("site-packages", site, of_site)):
        yield from ((f"{label}/{file.relative_to(root)}", file) for file in files)


def records(megabytes: int) -> Iterator[bytes]:
    """Lines of JSONL until there are enough; each text once, nothing empty, nothing that is not UTF-8."""
    written, seen = 0, set()
    for name, file in source_files():
        raw = file.read_bytes()
        digest = hashlib.sha256(raw).digest()
        if written >= megabytes * MB:
            return
        if not raw.strip() or digest in seen:
            continue
        seen.add(digest)
        try:
            record = {"text": raw.decode(), "path": name}
        except UnicodeDecodeError:
            continue
        line = json.dumps(record, ensure_ascii=False).encode() + b"\n"
        written += len(line)
        yield line


def build_corpus(work: Path, megabytes: int) -> tuple[Path, dict[str, Any]]:
    """The corpus and what is in it; made only where it is not there yet."""
    corpus, facts = work / f"corpus-{megabytes}.jsonl", work / f"corpus-{megabytes}.facts.json"
    if not facts.exists():
        digest, documents = hashlib.sha256(), 0
        with corpus.open("wb") as out:
            for line in records(megabytes):
                out.write(line)
                digest.update(line)
                documents += 1
        found = {"documents": documents, "bytes": corpus.stat().st_size, "sha256": digest.hexdigest()}
        facts.write_text(json.dumps(found))
    return corpus, json.loads(facts.read_text())


def tokenizer_folder(given: Path | None, corpus: Path, work: Path) -> Path:
    """A folder that AutoTokenizer reads: what was given, the sample's, or one trained here."""
    source = given or (SAMPLE_TOKENIZER if SAMPLE_TOKENIZER.exists() else None)
    folder = source.parent if source and source.is_file() else source
    if folder and (folder / "tokenizer_config.json").exists():
        return folder.resolve()
    name = "trained" if source is None else hashlib.sha256(str(source.resolve()).encode()).hexdigest()[:8]
    folder = work / f"tokenizer-{name}"
    folder.mkdir(exist_ok=True)
    if source is not None:
        shutil.copy(source / "tokenizer.json" if source.is_dir() else source, folder / "tokenizer.json")
    elif not (folder / "tokenizer.json").exists():
        train_tokenizer(corpus, folder / "tokenizer.json")
    if END not in (folder / "tokenizer.json").read_text():
        raise SystemExit(f"{source} has no {END}; give a folder that has a tokenizer_config.json with its eos_token")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def train_tokenizer(corpus: Path, target: Path) -> None:
    """A byte-level BPE of 4096 from every tenth document."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=4096, special_tokens=[END], initial_alphabet=alphabet)
    with corpus.open() as lines:
        tokenizer.train_from_iterator(
            (json.loads(line)["text"] for i, line in enumerate(lines) if i % 10 == 0), trainer
        )
    tokenizer.save(str(target))


# A contestant is one process with its children.


@dataclass
class Outcome:
    """One run: how long it took, what it said, and its memory where that was watched."""

    seconds: float
    said: dict[str, Any]
    failure: str = ""
    peak: float = 0.0
    peak_private: float = 0.0


@dataclass
class Contestant:
    label: str
    arguments: list[str]
    environment: dict[str, str]
    scratch: Path  # removed before a run, so that every run starts from nothing
    runs: list[Outcome] = field(default_factory=list)
    watched: Outcome | None = None

    def median(self) -> float:
        return statistics.median(run.seconds for run in self.runs)

    def failure(self) -> str:
        return next((run.failure for run in (*self.runs, *filter(None, [self.watched])) if run.failure), "")


def run(contestant: Contestant, corpus: Path, *, watch: bool = False, keep_scratch: bool = False) -> Outcome:
    """Runs it in a new process. Memory is watched in a run of its own: the watching slows the watched down."""
    if not keep_scratch:
        shutil.rmtree(contestant.scratch, ignore_errors=True)
    corpus.read_bytes()  # warm page cache
    os.sync()  # nobody waits for what the run before him has written
    environment = {**os.environ, **contestant.environment}
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        begin = time.perf_counter()
        process = subprocess.Popen([sys.executable, *contestant.arguments], env=environment, stdout=out, stderr=err)
        watcher = Watcher(process.pid) if watch else None
        process.wait()
        seconds = time.perf_counter() - begin
        peaks = watcher.stop() if watcher else (0.0, 0.0)
        out.seek(0)
        err.seek(0)
        return outcome(seconds, process.returncode, out.read(), err.read(), peaks)


def outcome(seconds: float, code: int, out: str, err: str, peaks: tuple[float, float]) -> Outcome:
    try:
        said = json.loads(out)
    except ValueError:
        said = None
    if code or said is None:
        return Outcome(seconds, {}, f"exit code {code}: {''.join(err.strip().splitlines()[-1:])}", *peaks)
    return Outcome(seconds, said, "", *peaks)


class Watcher(threading.Thread):
    """The most memory that a process and all its descendants have held at one time, looked at every 20 ms."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.pid, self.done, self.peaks = pid, threading.Event(), [0.0, 0.0]
        self.start()

    def run(self) -> None:
        import psutil

        while not self.done.wait(0.02):
            try:
                process = psutil.Process(self.pid)
                family = [process, *process.children(recursive=True)]
            except psutil.NoSuchProcess:
                continue
            sums = [sum(column) for column in zip(*(memory(member) for member in family), strict=True)]
            self.peaks = [max(pair) for pair in zip(self.peaks, sums, strict=True)]

    def stop(self) -> tuple[float, float]:
        self.done.set()
        self.join()
        return self.peaks[0] / MB, self.peaks[1] / MB


def memory(process: Any) -> tuple[int, int]:
    """Bytes of one process: its fair share of all its pages (PSS), and of those that no file backs."""
    import psutil

    try:
        lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()[1:]
        kilobytes = {key: int(rest.split()[0]) for key, _, rest in (line.partition(":") for line in lines)}
        return kilobytes["Pss"] * 1024, kilobytes["Pss_Anon"] * 1024
    except (OSError, KeyError):
        pass
    try:
        return process.memory_info().rss, 0
    except psutil.Error:  # gone in between
        return 0, 0


# The peers, in the child process.


def peer(kind: str, processes: int, corpus: str, tokenizer_path: str) -> None:
    """Tokenises and packs as people do, and prints the number of tokens."""
    from datasets import load_dataset
    from transformers import AutoTokenizer

    documents = load_dataset("json", data_files=corpus, split="train")
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)
    workers = processes if processes > 1 else None  # None stays in this process

    def tokenise(batch: dict[str, list[Any]]) -> dict[str, list[list[int]]]:
        # Text is text: an "<|endoftext|>" in a source file is no end of a document.
        options = {"add_special_tokens": False, "return_attention_mask": False, "split_special_tokens": True}
        ids = tokenizer(batch["text"], **options)["input_ids"]
        return {"input_ids": [[*one, tokenizer.eos_token_id] for one in ids]}

    tokens = documents.map(tokenise, batched=True, num_proc=workers, remove_columns=documents.column_names)
    if kind == "trl":
        from trl import pack_dataset

        packed = pack_dataset(tokens, seq_length=ROW_TOKENS, strategy="bfd_split", map_kwargs={"num_proc": workers})
    else:
        packed = tokens.map(group_texts, batched=True, num_proc=workers)
    print(json.dumps({"tokens": total(tokens), "tokens_packed": total(packed), "rows": len(packed)}))


def group_texts(batch: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
    """What the language-model scripts of transformers do: join, cut, and drop what is left of every batch."""
    joined = {key: list(chain.from_iterable(batch[key])) for key in batch}
    length = len(joined["input_ids"]) // ROW_TOKENS * ROW_TOKENS
    return {key: [ids[i : i + ROW_TOKENS] for i in range(0, length, ROW_TOKENS)] for key, ids in joined.items()}


def total(dataset: Any) -> int:
    """Tokens of a dataset, from the lengths of its lists: the tokens themselves are not read."""
    import pyarrow.compute as pc

    return sum(pc.sum(pc.list_value_length(chunk)).as_py() or 0 for chunk in dataset.data.column("input_ids").chunks)


def peer_contestant(kind: str, processes: int, corpus: Path, tokenizer: Path, work: Path) -> Contestant:
    scratch = work / "hf"
    arguments = [__file__, "--peer", kind, "--num-proc", str(processes), "--corpus", corpus, "--tokenizer", tokenizer]
    environment = {
        "HF_HOME": str(scratch),
        "HF_DATASETS_CACHE": str(scratch / "datasets"),
        "HF_DATASETS_OFFLINE": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        # One process lets the tokenizer's own threads have every core; among several these would fight.
        "TOKENIZERS_PARALLELISM": "true" if processes == 1 else "false",
    }
    return Contestant(f"{PEERS[kind]}, num_proc {processes}", [*map(str, arguments)], environment, scratch)


def fastest_peer(kind: str, corpus: Path, tokenizer: Path, work: Path) -> Contestant:
    """The peer with the number of processes that is best here: each is tried once, outside of the result."""
    tried: dict[float, Contestant] = {}
    for processes in sorted({1, 2, os.cpu_count() or 1}):
        contestant = peer_contestant(kind, processes, corpus, tokenizer, work)
        trial = run(contestant, corpus)
        if trial.failure:
            raise SystemExit(f"{contestant.label}: {trial.failure}")
        note(f"tried {contestant.label}: {trial.seconds:.1f} s")
        tried[trial.seconds] = contestant
    return tried[min(tried)]


# Ours.


def our_contestant(corpus: Path, tokenizer: Path, work: Path) -> Contestant:
    from tokenizers import Tokenizer

    model = {
        "model_type": "llama",
        "vocab_size": Tokenizer.from_file(str(tokenizer / "tokenizer.json")).get_vocab_size(),
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
    }
    config = {
        "run": {"output_dir": str(work / "ours")},
        "model": {"from_config": model, "tokenizer": str(tokenizer)},
        "data": {"max_tokens": ROW_TOKENS, "overlap_tokens": 128},
        "phases": [{"name": "one", "sources": str(corpus)}],
    }
    path = work / "ours.yaml"
    path.write_text(json.dumps(config, indent=1))  # JSON is YAML
    arguments = ["-m", "phased_cpt", "prepare", "-c", str(path), "--json"]
    return Contestant(OURS, arguments, {"PYTHONPATH": str(REPOSITORY)}, work / "ours")


def our_splits(said: dict[str, Any]) -> list[dict[str, Any]]:
    return [split for phase in said["phases"] for split in phase["splits"].values() if split]


def sum_of(said: dict[str, Any], key: str) -> int:
    return sum(split.get(key) or 0 for split in our_splits(said))


# What is printed.


def note(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def row(contestant: Contestant, ours: Contestant) -> str:
    if contestant.failure():
        return f"| {contestant.label} | failed: {contestant.failure()} | | | | | | |"
    times = [run.seconds for run in contestant.runs]
    ratio = "—" if ours.failure() else f"{contestant.median() / ours.median():.1f}"
    said, watched = contestant.runs[0].said, contestant.watched or Outcome(0, {})
    us = contestant is ours
    tokens, rows = (sum_of(said, "tokens_source"), sum_of(said, "blocks")) if us else (said["tokens"], said["rows"])
    return (
        f"| {contestant.label} | {contestant.median():.2f} | {min(times):.2f} – {max(times):.2f} | {ratio} "
        f"| {watched.peak:,.0f} | {watched.peak_private:,.0f} | {tokens:,} | {rows:,} |"
    )


def print_header(facts: dict[str, Any], tokenizer: Path, repeats: int) -> None:
    libraries = ("datasets", "transformers", "tokenizers", "trl")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in libraries)
    vocabulary = len(json.loads((tokenizer / "tokenizer.json").read_text())["model"]["vocab"])
    print(
        f"{datetime.now(UTC):%Y-%m-%d}, {os.cpu_count()} cores, {versions}, warm disk, medians of {repeats}; "
        f"{facts['documents']:,} Python sources, {facts['bytes'] / MB:.1f} MB of JSONL "
        f"(sha256 {facts['sha256'][:12]}), a vocabulary of {vocabulary:,}, rows of {ROW_TOKENS:,} tokens:\n"
    )


def print_table(peers: list[Contestant], ours: Contestant) -> None:
    print("| contestant | median s | min – max s | ratio | peak MB | of it not files | tokens | rows |")
    print("|---|---|---|---|---|---|---|---|")
    print(*(row(one, ours) for one in (ours, *peers)), sep="\n")


def print_ours(ours: Contestant, cached: list[Outcome], peers: list[Contestant]) -> None:
    """What only ours has: the cached run, the backend, and whether its tokens are as many as the peers'."""
    broken = next((one.failure for one in cached if one.failure), "")
    if ours.failure() or broken:
        print(f"\n{OURS} did not run: {ours.failure() or broken}")
        return
    hits = all(split.get("cached") for one in cached for split in our_splits(one.said))
    said = " (says cached)" if hits else " (does NOT say cached)"
    print(f"\ncached: {statistics.median(one.seconds for one in cached):.2f} s{said}")
    train = ours.runs[0].said["phases"][0]["splits"]["train"]  # eval's seconds have no tokenising in them
    print(f"backend {train.get('tokenizer_backend')}, {train.get('mb_per_second')} MB/s by its own clock")
    ours_tokens = sum_of(ours.runs[0].said, "tokens_source")
    for one in (one for one in peers if not one.failure()):
        more = ours_tokens - one.runs[0].said["tokens"]
        verdict = "equal" if not more else f"differs by {more:+,} of {one.runs[0].said['tokens']:,}"
        print(f"tokens, {OURS} against {one.label}: {verdict}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=100, help="size of the corpus, if that many sources are there")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tokenizer", type=Path, help="a folder or a tokenizer.json; the sample's if absent")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "phased-cpt-benchmark")
    for name in ("--peer", "--corpus"):
        parser.add_argument(name, help=argparse.SUPPRESS)  # the child's
    parser.add_argument("--num-proc", type=int, default=1, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    given = arguments()
    if given.peer:
        return peer(given.peer, given.num_proc, given.corpus, str(given.tokenizer))
    work: Path = given.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    corpus, facts = build_corpus(work, given.megabytes)
    tokenizer = tokenizer_folder(given.tokenizer, corpus, work)
    ours = our_contestant(corpus, tokenizer, work)
    peers = [fastest_peer(kind, corpus, tokenizer, work) for kind in PEERS]
    cached: list[Outcome] = []
    for turn in range(given.repeats):
        for one in (ours, *peers):
            one.runs.append(run(one, corpus))
            note(f"turn {turn + 1}, {one.label}: {one.runs[-1].failure or f'{one.runs[-1].seconds:.1f} s'}")
            if one is ours:
                cached.append(run(ours, corpus, keep_scratch=True))
    for one in (ours, *peers):
        one.watched = run(one, corpus, watch=True)
    print_header(facts, tokenizer, given.repeats)
    print_table(peers, ours)
    print_ours(ours, cached, peers)
    return None


if __name__ == "__main__":
    main()
