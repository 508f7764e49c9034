"""The command line: `python -m headless run FILE ...`."""

import argparse
import logging
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from wan_core.runtime import Cancelled

from ..nodes import NODE_CLASS_MAPPINGS, host
from .batch.command import BATCH_ARGUMENTS, LIKE_RUN, batch
from .cards import GPUS, on_cards
from .client import run_all_on_server
from .core_nodes import core_nodes
from .file_commands import (
    CONVERT_ARGUMENTS,
    FORM_ARGUMENTS,
    INFO_ARGUMENTS,
    LORA_ARGUMENTS,
    Arguments,
    convert,
    info,
    lora,
)
from .film_commands import (
    DECODE_ARGUMENTS,
    DECODES_LIKE_RUN,
    EXTEND_ARGUMENTS,
    SEGMENTS_ARGUMENTS,
    decode,
    extend,
    segments,
)
from .folders import Folders, workflow_file
from .overrides import (
    RECOMMENDED_ARGUMENTS,
    apply_measure,
    apply_recommended,
    apply_sets,
    apply_tiny,
    expand_prefixes,
    typed_values,
)
from .plan import PLAN_ARGUMENTS, plan
from .progress import Progress
from .runner import Event, run
from .schema import NodeSchema, schemas_of, validate
from .server import Server, ServerUnreachableError
from .workflow import Workflow

OK, FAILED, BAD_USAGE, UNREACHABLE, INTERRUPTED = 0, 1, 2, 3, 130
SIGNALLED = 128
"""Exit codes; a signal's number is added to the last. 130 is what shells give to a program that Ctrl-C ended."""


def _folder(text: str) -> Path:
    """A folder that was typed. An empty text is refused: most likely it comes from an unset shell variable."""
    if not text.strip() or "\0" in text:
        raise argparse.ArgumentTypeError(f"{text!r} is not the name of a folder")
    return Path(text)


RUN_ARGUMENTS: Arguments = {
    "files": {
        "metavar": "FILE",
        "type": workflow_file,
        "nargs": "+",
        "help": "workflow in API format, or the name of one in workflows/api such as t2v; several run in turn",
    },
    "--set": {
        "metavar": "NODE.INPUT=VALUE",
        "dest": "sets",
        "action": "append",
        "default": [],
        "help": "override an input; NODE is a title or an id; may be given many times",
    },
    "--out": {"metavar": "DIR", "type": _folder, "default": Path("output"), "help": "where files go (default: output)"},
    "--input": {
        "metavar": "DIR",
        "type": _folder,
        "default": Path("input"),
        "help": "where input images and videos are (default: input)",
    },
    "--server": {"metavar": "URL", "help": "run on this ComfyUI server instead, such as http://127.0.0.1:8188"},
    "--tiny": {"action": "store_true", "help": "use the bundled models, with their sizes, steps and prompt"},
    **RECOMMENDED_ARGUMENTS,
    "--device": {
        "choices": ("auto", "cpu", "cuda", "mps"),
        "help": "where models compute in this process (default: auto)",
    },
    "--preview-every": {
        "metavar": "N",
        "type": int,
        "default": 0,
        "help": "write a preview into DIR/previews each N steps of a sampler (default: none)",
    },
    "--quiet": {"action": "store_true", "help": "print only the paths of saved files, and errors"},
    "--measure": {
        "action": "store_true",
        "help": "skip no step, and keep beside the model what MagCache needs to know of it, for later runs",
    },
}


FILM_ARGUMENTS: Arguments = {name: RUN_ARGUMENTS[name] for name in RUN_ARGUMENTS if name not in ("files", "--measure")}
"""Those of `extend` and `segments` that are as of `run`."""

NOT_CHOSEN = {
    "sets": (),
    "server": None,
    "recommended": None,
    "more_motion": False,
    "preview_every": 0,
    "measure": False,
}
"""Arguments of `run` that other commands do not have."""


@dataclass(frozen=True)
class Command:
    """A subcommand: its arguments, and what it does with them.

    Attributes:
        execute: returns the exit code.
        one_of: further arguments, exactly one of which has to be given.
    """

    help: str
    arguments: Arguments
    execute: Callable[[argparse.Namespace], int]
    one_of: Arguments = field(default_factory=dict)

    def declare(self, parser: argparse.ArgumentParser) -> None:
        """Add the arguments to a parser."""
        for flag, options in self.arguments.items():
            parser.add_argument(flag, **options)
        if self.one_of:
            group = parser.add_mutually_exclusive_group(required=True)
            for flag, options in self.one_of.items():
                group.add_argument(flag, **options)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code; errors go to stderr."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[0] in TRAINING_COMMANDS:
        return _run_trainer(words[0], words[1:])
    parser = argparse.ArgumentParser(prog=_program(), description="Wan models without an editor.")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=command.help, description=command.help)
        command.declare(subparser)
        subparser.set_defaults(execute=command.execute)
    for name, text in TRAINING_COMMANDS.items():
        subparsers.add_parser(name, help=text)
    arguments = parser.parse_args(words)
    arguments.words = words
    level = logging.ERROR if getattr(arguments, "quiet", False) else logging.INFO
    logging.basicConfig(level=level, stream=sys.stderr, format="%(message)s")
    # Its writer tells of every file.
    logging.getLogger("gguf").setLevel(max(level, logging.WARNING))
    try:
        with _signals_as_exceptions():
            return arguments.execute(arguments)
    except _Terminated as error:
        return _fail(SIGNALLED + error.number, f"Ended by {signal.Signals(error.number).name}.")
    except (KeyboardInterrupt, Cancelled) as error:
        return _fail(INTERRUPTED, str(error) or "Interrupted.")
    except RuntimeError as error:
        # The message of a node's ValueError is enough for the user; anything else is shown with its traceback.
        if error.__cause__ and not isinstance(error.__cause__, ValueError):
            traceback.print_exception(error.__cause__)
        return _fail(FAILED, str(error))
    except ServerUnreachableError as error:
        return _fail(UNREACHABLE, str(error))
    except ValueError as error:
        return _fail(BAD_USAGE, str(error))
    except OSError as error:
        return _fail(FAILED, str(error))


def _program() -> str:
    """The command that the user typed."""
    return "python -m headless" if Path(sys.argv[0]).name == "__main__.py" else "wancore"


class _Terminated(BaseException):
    """A signal asked this process to end."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextmanager
def _signals_as_exceptions() -> Iterator[None]:
    """Within the block SIGTERM and SIGHUP end the program as Ctrl-C does, so that nothing half-written stays."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        raise _Terminated(number)

    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    # An ignored signal stays ignored: that is how `nohup` keeps SIGHUP away.
    before = {n: signal.signal(n, end) for n in numbers if signal.getsignal(n) is not signal.SIG_IGN}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _fail(code: int, message: str) -> int:
    with suppress(OSError):
        print(message, file=sys.stderr)
    return code


def _run(arguments: argparse.Namespace) -> int:
    return _run_workflows([Workflow.load(file) for file in arguments.files], arguments)


def _run_film(
    build: Callable[[argparse.Namespace], tuple[Workflow, list[str]]],
) -> Callable[[argparse.Namespace], int]:
    """What a command executes that runs the workflow of `build`, with what was typed for it."""

    def execute(arguments: argparse.Namespace) -> int:
        workflow, typed = build(arguments)
        chosen = {**NOT_CHOSEN, **vars(arguments)}
        return _run_workflows([workflow], argparse.Namespace(**{**chosen, "sets": [*typed, *chosen["sets"]]}))

    return execute


def _run_workflows(workflows: list[Workflow], arguments: argparse.Namespace) -> int:
    if arguments.preview_every < 0:
        raise ValueError(f"--preview-every is a number of steps, or 0 for none; got {arguments.preview_every}.")
    if arguments.server and arguments.device:
        raise ValueError("--device holds for runs in this process; a server computes on its own device.")
    typed = typed_values(arguments.sets)
    folders = Folders(arguments.input, arguments.out, typed)
    on_event = (lambda _: None) if arguments.quiet else Progress().show
    nodes = {**core_nodes(folders), **NODE_CLASS_MAPPINGS}
    if arguments.tiny:
        workflows = [apply_tiny(workflow, nodes) for workflow in workflows]
    chosen = (arguments.recommended, arguments.more_motion)
    workflows = [apply_recommended(workflow, *chosen, nodes) for workflow in workflows]
    if arguments.measure:
        workflows = [apply_measure(workflow) for workflow in workflows]
    if arguments.server:
        server = Server(arguments.server)
        schemas = [server.schemas(workflow) for workflow in workflows]
        pairs = zip(workflows, schemas, strict=True)
        workflows = [expand_prefixes(apply_sets(workflow, arguments.sets, known)) for workflow, known in pairs]
        folders.check("downloaded")
        results = run_all_on_server(workflows, server, folders, schemas=schemas, on_event=on_event)
    else:
        known = schemas_of(nodes)
        _configure_host(arguments, on_event, typed)
        workflows = [expand_prefixes(apply_sets(workflow, arguments.sets, known)) for workflow in workflows]
        workflows = _validate_all(workflows, known)
        results = (run(workflow, nodes, on_event=on_event, folders=folders) for workflow in workflows)
    for result in results:
        for path in result.files:
            print(path, flush=True)
    return OK


def _validate_all(workflows: Sequence[Workflow], schemas: Mapping[str, NodeSchema]) -> list[Workflow]:
    """The workflows, all checked before the first runs.

    Raises:
        ValueError: the problems of all of them.
    """
    valid, wrong = [], []
    for workflow in workflows:
        try:
            valid.append(validate(workflow, schemas))
        except ValueError as error:
            wrong.append(str(error))
    if wrong:
        raise ValueError("\n".join(dict.fromkeys(wrong)))
    return valid


def _configure_host(arguments: argparse.Namespace, on_event: Callable[[Event], None], typed: Iterable[str]) -> None:
    def on_progress(phase: str, done: int, total: int) -> None:
        on_event(Event("progress", done=done, total=total, text=phase))

    host.configure(
        device=arguments.device,
        ranks=getattr(arguments, "ranks", None),
        input_dir=arguments.input,
        output_dir=arguments.out,
        on_progress=on_progress,
        preview_every=getattr(arguments, "preview_every", 0),
        typed=typed,
    )


def _print_text(answer: Callable[[argparse.Namespace], str]) -> Callable[[argparse.Namespace], int]:
    """What a command executes that prints the text of `answer`."""

    def execute(arguments: argparse.Namespace) -> int:
        print(answer(arguments))
        return OK

    return execute


def _print_verdict(answer: Callable[[argparse.Namespace], tuple[str, bool]]) -> Callable[[argparse.Namespace], int]:
    """The same of a command whose `answer` is a text, and whether all is well."""

    def execute(arguments: argparse.Namespace) -> int:
        text, fine = answer(arguments)
        print(text)
        return OK if fine else FAILED

    return execute


COMMANDS: Mapping[str, Command] = {
    "run": Command("Run a workflow in this process or on a ComfyUI server.", {**RUN_ARGUMENTS, **GPUS}, on_cards(_run)),
    "batch": Command(
        "Make many films from a list of jobs, again and again until all are finished.",
        {**BATCH_ARGUMENTS, **{flag: RUN_ARGUMENTS[flag] for flag in LIKE_RUN}},
        _print_verdict(batch),
    ),
    "extend": Command(
        "Continue a film by clips, each of which begins with the last frames of what is before it.",
        {**EXTEND_ARGUMENTS, **FILM_ARGUMENTS},
        _run_film(extend),
    ),
    "segments": Command(
        "Make a film through a list of pictures, with a clip from each to the next.",
        {**SEGMENTS_ARGUMENTS, **FILM_ARGUMENTS},
        _run_film(segments),
    ),
    "decode": Command(
        "Decode latents that a run saved into a video.",
        {**DECODE_ARGUMENTS, **{flag: RUN_ARGUMENTS[flag] for flag in DECODES_LIKE_RUN}},
        _run_film(decode),
    ),
    "plan": Command(
        "Say what a workflow will take of the card and of host memory, from headers alone.",
        PLAN_ARGUMENTS,
        _print_verdict(plan),
    ),
    "info": Command(
        "Say what model files are, what they need and which settings are recommended, from their headers.",
        INFO_ARGUMENTS,
        _print_text(info),
    ),
    "convert": Command(
        "Write a model as one file, in FP8, in a type of GGUF or in another dtype, from any file this library reads.",
        CONVERT_ARGUMENTS,
        _print_text(convert),
        one_of=FORM_ARGUMENTS,
    ),
    "lora": Command(
        "Say what LoRA files are and what they do to a model; convert, merge or extract them, or fuse them into it.",
        LORA_ARGUMENTS,
        _print_text(lora),
    ),
}

TRAINING_COMMANDS: Mapping[str, str] = {
    "train": "Train a model; flags as for python -m trainer.train.",
    "recipe": "Train a published checkpoint as the reference does.",
}
"""Commands of the trainer, which reads their arguments itself."""


def _run_trainer(name: str, words: Sequence[str]) -> int:
    from ..trainer import recipe, train  # takes seconds, and only these commands need it

    main = train.main if name == "train" else recipe.main
    return main(words, prog=f"{_program()} {name}")
