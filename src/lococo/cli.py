"""The command line: finds the verb, makes its flags from its signature, and says what went wrong in one line.

Only the parser of the verb that was asked for is built, and the page of `lococo --help` is printed without any, so that
help never waits for torch.
"""

import dataclasses
import difflib
import inspect
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from lococo import benching, converting, evaluating, extending, planning, serving, training, verbs
from lococo.errors import ArgumentError, LococoError

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

VERBS: dict[str, Callable[..., None]] = {
    "demo": verbs.demo,
    "run": verbs.run,
    "compress": verbs.compress,
    "ask": verbs.ask,
    "chat": verbs.chat,
    "inspect": verbs.inspect,
    "serve": serving.serve,
    "train": training.train,
    "extend": extending.extend,
    "merge": extending.merge,
    "ablate": training.ablate,
    "eval perplexity": evaluating.eval_perplexity,
    "eval positions": evaluating.eval_positions,
    "eval needle": evaluating.eval_needle,
    "eval suite": evaluating.eval_suite,
    "eval inside": evaluating.eval_inside,
    "report": evaluating.report,
    "bench": benching.bench,
    "plan": planning.plan,
    "convert chatglm3": converting.convert_chatglm3,
}

SHORT = {"output": "-o"}
METAVARS = {
    "json": "FILE",
    "picture": "FILE",
    "plot": "FILE",
    "output": "PATH",
    "data": "DIR",
    "compressor": "NAME",
    "model": "NAME",
    "lengths": "N",
    "logs": "DIR",
    "data_dir": "DIR",
    "text": "PATH",
    "trained_on": "DIR",
    "tasks": "NAME",
    "gpu": "NAME",
    "models": "NAME",
    "lora_targets": "NAME",
    "api_keys": "FILE",
    "contexts": "DIR",
}
NUMBERS = (int, int | None, float, tuple[int, ...])

USAGE_ERROR = 2
INTERRUPTED = 130  # as a shell reports SIGINT
BROKEN_PIPE = 141  # and SIGPIPE


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: The words after `lococo`; those of this process by default.

    Returns:
        The exit status: 0, 2 for a mistake of the user's, 130 after Ctrl-C.
    """
    try:
        _run(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()  # here, so that a full disk or a closed pipe is reported like everything else
    except LococoError as error:
        return _complain(str(error), USAGE_ERROR)
    except KeyboardInterrupt:
        return _complain("stopped", INTERRUPTED)
    except BrokenPipeError:
        # Python would flush into the closed pipe once more at exit, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except OSError as error:
        name = f"{error.filename}: " if error.filename else ""
        return _complain(f"{name}{error.strerror or error}", USAGE_ERROR)
    return 0


def _complain(message: str, status: int) -> int:
    print("lococo:", " ".join(message.split()), file=sys.stderr)
    return status


def _run(words: list[str]) -> None:
    if words[:1] == ["--version"]:
        from lococo import __version__

        print("lococo", __version__)
        return
    if not words or words[0] in ("-h", "--help"):
        print(_page())
        return
    name, words = _verb(words)
    if name is None:
        return
    verb = VERBS[name]
    parser = _parser(name, verb)
    try:
        flags = parser.parse_args(words)
    except UnicodeDecodeError as error:
        raise ArgumentError(f"--config is no text in UTF-8 ({error}); expected YAML") from error
    except SystemExit:  # --help and --print_config end this way; errors are raised, see _parser
        return
    verb(**_arguments(verb, flags))


def _verb(words: list[str]) -> tuple[str | None, list[str]]:
    """Split off the verb, which may be two words; None where a page was asked for and printed."""
    groups = {name.split()[0] for name in VERBS if " " in name}
    first, rest = words[0], words[1:]
    if first in groups:
        if not rest or rest[0] in ("-h", "--help"):
            print(_page(first))
            return None, []
        first, rest = f"{first} {rest[0]}", rest[1:]
    if first not in VERBS:
        nearest = difflib.get_close_matches(first, VERBS, 1)
        hint = f"did you mean {nearest[0]!r}?" if nearest else "see `lococo --help`"
        raise ArgumentError(f"no such command: {first!r}; {hint}")
    return first, rest


def _page(group: str = "") -> str:
    """Return the help of lococo itself, or of a group of verbs such as `eval`."""
    shown = {name.removeprefix(group).strip(): verb for name, verb in VERBS.items() if name.startswith(group)}
    heads = list(dict.fromkeys(name.split()[0] for name in shown))
    lines = [
        f"usage: {' '.join(['lococo', group]).strip()} [-h] {'' if group else '[--version] '}{{{','.join(heads)}}} ..."
    ]
    if not group:
        lines += ["", "Read text of any length with any Hugging Face decoder, in a fixed number of key/value slots."]
    lines.append("")
    lines += [f"  {name:<17} {_summary(verb)}" for name, verb in shown.items()]
    if not group:
        lines += ["", "  -h, --help        show this page; `lococo VERB --help` shows the flags of a verb"]
        lines += ["  --version         show the version"]
    return "\n".join(lines)


def flag_names(verb: Callable[..., None]) -> list[str]:
    """Return the names of a verb's flags, those of its option groups included."""
    names: list[str] = []
    for parameter in inspect.signature(verb).parameters.values():
        if dataclasses.is_dataclass(parameter.annotation):
            names += [field.name for field in dataclasses.fields(parameter.annotation)]
        elif parameter.kind is parameter.KEYWORD_ONLY:
            names.append(parameter.name)
    return names


def _summary(documented: object) -> str:
    return (inspect.getdoc(documented) or "").partition("\n")[0]


def _parser(name: str, verb: Callable[..., None]) -> "ArgumentParser":
    """Make a verb's parser of its signature: positional parameters, flags, and the fields of its option groups."""
    from jsonargparse import ArgumentParser

    class Parser(ArgumentParser):
        def error(self, message: str, ex: Exception | None = None) -> NoReturn:
            raise ArgumentError(f"{_plain(message, flag_names(verb))}; see `lococo {name} --help`")

    parser = Parser(prog=f"lococo {name}", description=_summary(verb), allow_abbrev=False)
    helps = _helps(verb)
    for parameter in inspect.signature(verb).parameters.values():
        if dataclasses.is_dataclass(parameter.annotation):
            group = parser.add_argument_group(_summary(parameter.annotation).rstrip("."))
            field_helps = _helps(parameter.annotation)
            for field in dataclasses.fields(parameter.annotation):
                _add_flag(group, field.name, field.type, field.default, field_helps)
        elif parameter.kind is parameter.POSITIONAL_OR_KEYWORD:
            many: dict[str, Any] = {"nargs": "+"} if parameter.annotation == list[str] else {}
            parser.add_argument(parameter.name, type=str, help=helps.get(parameter.name), **many)
        else:
            _add_flag(parser, parameter.name, parameter.annotation, parameter.default, helps)
    parser.add_argument(
        "--config", action="config", metavar="FILE", help="YAML file with flags, written with underscores."
    )
    return parser


def _add_flag(parser: Any, name: str, kind: Any, default: Any, helps: dict[str, str]) -> None:
    names = [SHORT[name]] if name in SHORT else []
    names.append(_flag(name))
    settings: dict[str, Any] = {"help": helps.get(name)}
    if kind is bool and default is True:
        from jsonargparse import ActionYesNo

        parser.add_argument(*names, action=ActionYesNo(no_prefix="no-"), default=True, **settings)
        return
    if kind is bool:
        parser.add_argument(*names, action="store_true", **settings)
        return
    if kind in (list[str], list[int], list[Any], tuple[int, ...], tuple[str, ...]):
        settings.update(nargs="*" if isinstance(default, tuple) else "+", type=kind.__args__[0])
    else:
        settings.update(type=kind)
    if "Literal" not in str(kind):
        settings["metavar"] = METAVARS.get(name, "N" if kind in NUMBERS else name.upper())
    if default is inspect.Parameter.empty:
        settings["required"] = True
    else:
        settings["default"] = list(default) if isinstance(default, tuple) else default
    parser.add_argument(*names, **settings)


def _helps(documented: Any) -> dict[str, str]:
    """Return the lines of a Google-style docstring about arguments or attributes, by name."""
    helps: dict[str, str] = {}
    name = None
    section = re.split(r"^(?:Args|Attributes):\n", inspect.getdoc(documented) or "", maxsplit=1, flags=re.MULTILINE)[-1]
    for line in section.splitlines():
        if line and not line.startswith(" "):  # the next section
            break
        if found := re.match(r" {4}(\w+): (.*)", line):
            name, helps[found[1]] = found[1], found[2]
        elif name:
            helps[name] += " " + line.strip()
    return {name: text.strip() for name, text in helps.items()}


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _plain(message: str, flags: Sequence[str]) -> str:
    """Put what the parser says about Python types into words."""
    message = " ".join(message.split())
    message = re.sub(r'^Parser key "(\w+)":', lambda found: _flag(found[1]) + ":", message)
    message = message.replace("Expected a <class 'int'>", "expected a whole number")
    message = message.replace("Expected a <class 'float'>", "expected a number")
    message = re.sub(r"Expected a typing\.Literal\[(.*?)\]", r"expected one of \1", message)
    if re.search("object is not iterable|does not support item assignment", message):
        return "--config has one value where several may stand; put it into brackets, such as num_slots: [64]"
    message = re.sub("^Unexpected config:.*", "--config: expected lines such as num_slots: [64], found none", message)
    required = "the following arguments are required: "
    if message.startswith(required):
        names = message.removeprefix(required).split(", ")
        message = required + ", ".join(_flag(name) if name in flags else name for name in names)
    return message.replace(". Got value:", ", got").rstrip(".")


def _arguments(verb: Callable[..., None], flags: Any) -> dict[str, Any]:
    """Sort parsed flags back into a verb's arguments."""
    arguments: dict[str, Any] = {}
    for parameter in inspect.signature(verb).parameters.values():
        kind = parameter.annotation
        if dataclasses.is_dataclass(kind):
            assert isinstance(kind, type)
            arguments[parameter.name] = kind(**{field.name: flags[field.name] for field in dataclasses.fields(kind)})
        else:
            arguments[parameter.name] = flags[parameter.name]
    return arguments
