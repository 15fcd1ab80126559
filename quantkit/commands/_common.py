"""What several verbs share: groups of arguments, and the two ways out (tables on stderr, JSON on stdout)."""

from __future__ import annotations

import json
import math
import os
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any

from quantkit.budget import parse_bytes
from quantkit.calibration.request import CalibrationRequest
from quantkit.commands import _loss
from quantkit.errors import InputError
from quantkit.options import ACTIVATIONS, CALIBRATORS, INPUTS, RUNTIMES, Options

MOST_THREADS = 1024

if TYPE_CHECKING:
    from quantkit.report.console import ErrorConsole
    from quantkit.report.progress import Progress


def add_output(parser: ArgumentParser) -> None:
    """--json, --quiet, --verbose, --debug."""
    group = parser.add_argument_group("messages")
    group.add_argument("--json", action="store_true", help="print the result as JSON on standard output")
    group.add_argument("-q", "--quiet", action="store_true", help="no tables and no progress, only errors")
    group.add_argument("-v", "--verbose", action="store_true", help="say what is being done, with times, line by line")
    group.add_argument("--debug", action="store_true", help="the same with versions, and the traceback of an error")


def add_data(parser: ArgumentParser) -> None:
    """Where samples come from."""
    group = parser.add_argument_group("data")
    group.add_argument(
        "--calib",
        metavar="SRC",
        help="calibration data: a .npz or .npy file (first axis = samples; FILE.npz:KEY for one array), a folder of "
        "test_data_set_*/input_*.pb, a folder of images, a text file, or MODULE:FUNCTION; "
        "SRC@START:STOP:STEP takes a part",
    )
    group.add_argument("--preprocess", metavar="P", help="for images: a preset such as imagenet, or a YAML/JSON file")
    group.add_argument("--tokenizer", metavar="FILE", help="for text: a tokenizer.json")
    group.add_argument("--samples", metavar="N", type=int, help="use at most N samples")
    group.add_argument("--batch-size", metavar="N", type=int, help="samples per run of the model")
    group.add_argument(
        "--random-calibration", action="store_true", help="make inputs up when there is no data (figures mean little)"
    )


def add_run(parser: ArgumentParser) -> None:
    """How to emit and measure."""
    group = parser.add_argument_group("run")
    group.add_argument("--target", choices=RUNTIMES, help="what the file is for (default: ort-cpu)")
    group.add_argument("--threads", metavar="N", type=int, default=1, help="onnxruntime threads, 0 = all (default: 1)")
    group.add_argument(
        "--workers", metavar="N", type=int, default=0, help="processes for layers (default: 0 = all cores)"
    )
    group.add_argument("--seed", metavar="N", type=int, help="of everything random (default: 0)")
    group.add_argument(
        "--cache",
        metavar="DIR",
        help="folder for finished work, so that a run that was stopped goes on there, and for measured latencies",
    )
    limit = f"{Options.memory_limit >> 20}MiB"
    group.add_argument("--memory-limit", metavar="SIZE", default=limit, help=f"for calibration (default: {limit})")


def add_files(parser: ArgumentParser) -> None:
    """What is written beside the model."""
    group = parser.add_argument_group("files")
    group.add_argument("-o", "--output", metavar="OUT", help="the model to write (default: MODEL with .q.onnx)")
    group.add_argument("--save-plan", metavar="FILE", help="write the plan as JSON, to edit and apply again")
    group.add_argument("--report", metavar="FILE", help="write the report, as .html or .json")
    group.add_argument("--all-layers", action="store_true", help="show every layer of a large model")


def add_method_choice(parser: ArgumentParser, holdout: int = Options.holdout) -> None:
    """Which methods decide.

    Args:
        holdout: default of --holdout.
    """
    group = parser.add_argument_group("methods")
    group.add_argument("--bits", metavar="LIST", help="widths to choose from, such as 2,3,4,8 (default: 2 to 8)")
    group.add_argument(
        "--activations", choices=ACTIVATIONS, default="auto", help="8-bit integer activations (default: auto)"
    )
    group.add_argument("--allocator", metavar="NAME", default="auto", help="auto, or one of `quantkit methods`")
    group.add_argument("--quantizer", metavar="NAME", default="auto", help="auto, or one of `quantkit methods`")
    group.add_argument(
        "--transform",
        metavar="LIST",
        help="rescale layers first, which changes nothing in float: none, auto (by measurement), or names such as "
        "cle,smoothquant (default: none; awq with --quantizer awq)",
    )
    group.add_argument(
        "--calibrator", choices=CALIBRATORS, default="auto", help="how activation ranges are taken (default: auto)"
    )
    group.add_argument(
        "--inputs",
        choices=INPUTS,
        default="auto",
        help="quantize layers on the float model's values, or on what the quantized layers before them produce "
        "(default: auto, by measurement)",
    )
    group.add_argument(
        "--augment", metavar="N", type=int, default=1, help="disturbed copies of calibration texts (default: 1)"
    )
    group.add_argument(
        "--holdout", metavar="P", type=int, help=f"percent of the samples that only measure (default: {holdout})"
    )
    group.add_argument("--group-size", metavar="N", type=int, help="inputs per scale, -1 = one scale per output")
    group.add_argument("--ignore", metavar="PATTERN", action="append", help="keep layers float: a name or re:PATTERN")
    _loss.add_loss(group, "--allocator")
    group.add_argument(
        "--set", metavar="M.S=VALUE", action="append", help="a method's setting, such as mse.steps=40; repeatable"
    )


def calibration_of(args: Namespace) -> CalibrationRequest | None:
    """The data asked for, or None."""
    given = [
        option
        for option, value in (
            ("--preprocess", args.preprocess),
            ("--tokenizer", args.tokenizer),
            ("--samples", args.samples),
            ("--batch-size", args.batch_size),
        )
        if value is not None
    ]
    for option, value in (("--samples", args.samples), ("--batch-size", args.batch_size)):
        if value is not None and value < 1:
            raise InputError(f"{option} must be at least 1, got {value}")
    if args.calib is None:
        if given and getattr(args, "eval", None) is None:
            raise InputError(f"{', '.join(given)} needs data to apply to: give --calib")
        return None
    return _request(args, args.calib)


def _request(args: Namespace, source: str) -> CalibrationRequest:
    return CalibrationRequest(
        source=source,
        preprocess=args.preprocess,
        tokenizer=args.tokenizer,
        batch_size=args.batch_size,
        max_samples=args.samples,
    )


def evaluation_data(args: Namespace, source: str) -> CalibrationRequest:
    """Held-out data, read like the calibration data but all of it."""
    return CalibrationRequest(
        source=source, preprocess=args.preprocess, tokenizer=args.tokenizer, batch_size=args.batch_size
    )


def run_options(args: Namespace) -> dict[str, Any]:
    """Fields of Options behind add_run and --random-calibration."""
    check_run(args)
    cache = Path(args.cache) if args.cache else None
    if cache is not None and cache.exists() and not cache.is_dir():
        raise InputError(f"--cache {cache} is a file; give a folder")
    if cache is not None:
        try:
            cache.mkdir(parents=True, exist_ok=True)
        except OSError as error:  # who asks for work to be kept should not learn afterwards that it was not
            raise InputError(f"--cache {cache}: cannot be made: {error.strerror}; give another folder") from error
    # Left out, the target and the seed are those of the plan, if there is one.
    given = {key: value for key, value in (("target", args.target), ("seed", args.seed)) if value is not None}
    return {
        **given,
        "threads": args.threads,
        "workers": args.workers,
        "cache": cache,
        "memory_limit": parse_bytes(args.memory_limit, "--memory-limit"),
        "random_calibration": args.random_calibration,
    }


def check_run(args: Namespace) -> None:
    """Raises: InputError for --threads and --seed that nothing can run with."""
    for option, count in (("--threads", args.threads), ("--workers", getattr(args, "workers", 0))):
        if count < 0:
            raise InputError(f"{option} must be 0 or more, got {count}")
        if count > MOST_THREADS:
            raise InputError(f"{option} must be at most {MOST_THREADS}, got {count}")
    if (getattr(args, "seed", None) or 0) < 0:
        raise InputError(f"--seed must be 0 or more, got {args.seed}")


def existing_file(text: str) -> Path:
    """Raises: InputError when there is no such file."""
    path = Path(text)
    if path.is_dir():
        raise InputError(f"{path} is a folder; give the .onnx file in it")
    if not path.exists():
        raise InputError(f"there is no file {path}")
    if not path.is_file():
        raise InputError(f"{path} is a device or a pipe; give a regular file")
    return path


def keep_external(outputs: Mapping[str, Path | None], model: Path) -> None:
    """Refuse to write over files that hold the model's weights."""
    from quantkit.graph.load import data_files

    files: set[Path] = set()
    with suppress(Exception):  # a model that cannot be read is explained when it is loaded
        files = {file.resolve() for file in data_files(model)}
    for option, path in outputs.items():
        if path is None:
            continue
        hit = {path.resolve(), path.resolve().with_name(f"{path.name}.data")} & files
        if hit:
            raise InputError(f"{option} {path} would overwrite {hit.pop()}, which holds weights of {model}; rename it")


def output_path(text: str | None, model: Path) -> Path:
    """OUT, or `model.q.onnx` beside the model."""
    return Path(text) if text else model.with_name(f"{model.stem}.q.onnx")


def check_writable(outputs: Mapping[str, Path | None], inputs: Mapping[str, Path]) -> None:
    """Refuse, before any work, to write where it cannot be or where it would destroy something.

    Args:
        outputs: option -> file that will be written (None = not asked for).
        inputs: what it is -> file that must survive, or folder whose images and tensors must.
    """
    taken: dict[Path, str] = {}
    for option, path in outputs.items():
        if path is None:
            continue
        if path.is_dir():
            raise InputError(f"{option} {path} is a folder; give a file name")
        if path.exists() and not path.is_file():
            raise InputError(f"{option} {path} is a device; give a file name")
        if not path.parent.is_dir():
            raise InputError(f"{option} {path}: there is no folder {path.parent}; create it first")
        try:
            with TemporaryFile(dir=path.resolve().parent):
                pass  # before the work, not after it
        except OSError as error:
            raise InputError(f"{option} {path}: cannot write there: {error.strerror}; choose another folder") from error
        for what, source in inputs.items():
            if (
                _is_sample(path, source)
                or path.resolve() == source.resolve()
                or (path.exists() and path.samefile(source))
            ):
                raise InputError(f"{option} {path} would overwrite the {what}; give another name")
        other = taken.setdefault(path.resolve(), option)
        if other != option:
            raise InputError(f"{other} and {option} are the same file {path}; give two names")


def _is_sample(path: Path, folder: Path) -> bool:
    """Whether a file is one that is read as data when the folder is given."""
    if not (path.exists() and folder.is_dir() and folder.resolve() in path.resolve().parents):
        return False
    from quantkit.calibration.images import SUFFIXES

    return path.suffix.lower() in (*SUFFIXES, ".pb")


def plot_path(text: str | None) -> Path | None:
    """Raises: InputError for --plot with another ending than that of a picture."""
    if text is None:
        return None
    path = Path(text)
    if path.suffix not in (".png", ".svg"):
        raise InputError(f"--plot must end in .png or .svg, got {path}")
    return path


def data_sources(args: Namespace) -> dict[str, Path]:
    """What it is -> file or folder, of everything that is read beside the model: nothing may be written over it."""
    found: dict[str, Path] = {}
    for name in ("calib", "eval", "tokenizer", "preprocess"):
        text = getattr(args, name, None)
        for part in [] if text is None else [text, *text.split(",")]:
            whole = part.partition("=")[2] or part
            for guess in (whole, whole.rpartition("@")[0], whole.rpartition(":")[0]):
                if guess and Path(guess).exists():
                    found.setdefault(f"data of --{name}: {guess}", Path(guess))
    return found


def output_folder(option: str, text: str) -> Path:
    """A folder to write several files into: an empty one, or one that is still to be made.

    Raises:
        InputError: it holds files, is no folder, or cannot be made.
    """
    path = Path(text)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise InputError(f"{option} {path} must be a new or empty folder; give another name")
    if not path.resolve().parent.is_dir():
        raise InputError(f"{option} {path}: there is no folder {path.resolve().parent}; create it first")
    return path


def console_of(args: Namespace) -> ErrorConsole:
    """Standard error for tables."""
    from quantkit.report.console import ErrorConsole

    return ErrorConsole(quiet=args.quiet)


def progress_of(args: Namespace, console: ErrorConsole | None = None) -> Progress:
    """Bars, on the console given or one of their own; lines with --verbose; nothing with --quiet."""
    from quantkit.report.progress import ConsoleProgress, SilentProgress

    if args.verbose or args.debug:
        from quantkit.commands._messages import LoggingProgress

        return LoggingProgress()
    return SilentProgress() if args.quiet else ConsoleProgress(console or console_of(args))


def print_json(data: Any) -> None:
    """One JSON document on standard output; a reader that went away is no error."""
    with suppress(BrokenPipeError):
        sys.stdout.write(to_json(data) + "\n")
    flush_stdout()


def flush_stdout() -> None:
    """Flush now, so that a reader that went away is noticed here and not while Python shuts down."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def to_json(data: Any) -> str:
    """Indented JSON; figures that JSON does not have (infinite, undefined) are null."""
    return json.dumps(_plain(data), indent=2, allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, Path):
        return str(value)
    number = float(value)  # numpy scalars too
    return number if math.isfinite(number) else None
