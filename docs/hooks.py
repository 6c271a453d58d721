"""What `mkdocs build` adds to the pages of this folder (mkdocs.yml names this file as a hook).

- README, CONTRIBUTING, CHANGELOG, SECURITY and benchmarks/README.md become pages, a picture of benchmarks/ a file of the site.
- Links are written for the repository, where the same files are read; they are turned into links of the site.
- Flags and refused names are generated from the code, so that the pages cannot differ from `--help`.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import os
import posixpath
import re
import typing
from html import escape
from pathlib import Path

from mkdocs.structure.files import File

from bge_ds import encode, evaluate, export, merge, mine, preprocess, score
from bge_ds.config.arguments import (
    FinetuneArguments,
    GroupArguments,
    PretrainArguments,
    RerankArguments,
    TrainArguments,
)
from bge_ds.config.huggingface_names import ALIASES, REFUSED, accepted
from bge_ds.config.parser import groups_of
from bge_ds.doctor import __main__ as doctor

REPO = Path(__file__).resolve().parent.parent
# File of the repository -> file of the site.
BROUGHT_IN = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
    "benchmarks/README.md": "measuring.md",
}
GENERATE = re.compile(r"<!-- generate: (\w+) -->")  # a function of this file: what it returns
INCLUDE = re.compile(r'<!-- include (\S+) "(.+)" -->')  # file, heading: the text of its section
LINK = re.compile(r"(?P<image>!?)\[(?P<text>[^\]]*)\]\((?P<target>[^)\s#]+)(?P<anchor>#[^)\s]*)?\)")


# ------------------------------------------------------------------------------------------------------- called by mkdocs


def on_files(files, config):
    for source, name in BROUGHT_IN.items():
        if name.endswith(".md"):
            files.append(File.generated(config, name, content=(REPO / source).read_text(encoding="utf-8")))
        else:
            files.append(File.generated(config, name, abs_src_path=str(REPO / source)))
    return files


def on_page_markdown(markdown, page, config, files):
    name = page.file.src_uri
    sources = {of_site: of_repository for of_repository, of_site in BROUGHT_IN.items()}
    markdown = INCLUDE.sub(lambda found: links_of_site(section(found[1], found[2]), found[1], name), markdown)
    markdown = links_of_site(markdown, sources.get(name, f"docs/{name}"), name)
    generators = {"flags": flags, "refused": refused}
    return GENERATE.sub(lambda found: generators[found[1]](), markdown)


def section(source: str, heading: str) -> str:
    """The text below a second-level heading of a file of the repository. Raises ValueError where it has no such heading."""
    _, found, rest = (REPO / source).read_text(encoding="utf-8").partition(f"\n## {heading}\n")
    if not found:
        raise ValueError(f"{source} has no heading '## {heading}', which a page of docs/ includes; correct the include comment")
    return rest.partition("\n## ")[0].strip()


def links_of_site(markdown: str, source: str, name: str) -> str:
    """The text of the page `name`, written as the file `source` of the repository, with links of the site.

    A link to a file that is not on the site becomes its text. Links to other sites stay, and so does what leads nowhere: mkdocs
    complains about it.
    """

    def change(link: re.Match) -> str:
        if ":" in link["target"]:
            return link[0]
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), link["target"]))
        if target in BROUGHT_IN:
            found = BROUGHT_IN[target]
        elif target.startswith("docs/"):
            found = target.removeprefix("docs/")
        else:
            return link["text"] if (REPO / target).exists() else link[0]
        path = posixpath.relpath(found, posixpath.dirname(name) or ".")
        return f"{link['image']}[{link['text']}]({path}{link['anchor'] or ''})"

    return LINK.sub(change, markdown)


# ------------------------------------------------------------------------------------------------------------- the flags


def flags() -> str:
    shared = groups_of(TrainArguments, own=True)
    parts = [
        "## bge_ds.pretrain, bge_ds.finetune and bge_ds.rerank",
        *(part for title, names in shared for part in (f"### {title}", _table(TrainArguments, names))),
    ]
    for kind in (GroupArguments, PretrainArguments, FinetuneArguments, RerankArguments):
        parts.append("## bge_ds.finetune and bge_ds.rerank" if kind is GroupArguments else f"## {kind.command} only")
        for title, names in groups_of(kind, own=True):
            parts += [f"### {title}"] * bool(title) + [_table(kind, names)]
    parts += ["## bge_ds.preprocess", *_preprocess()]
    parts += ["## bge_ds.evaluate", _argparse_table(evaluate.parser()._actions, "evaluate")]
    parts += ["## bge_ds.encode", _argparse_table(encode.parser()._actions, "encode")]
    parts += ["## bge_ds.mine", _argparse_table(mine.parser()._actions, "mine")]
    parts += ["## bge_ds.score", _argparse_table(score.parser()._actions, "score")]
    parts += ["## bge_ds.merge", _argparse_table(merge.parser()._actions, "merge")]
    parts += ["## bge_ds.export", _argparse_table(export.parser()._actions, "export")]
    parts += ["## bge_ds.doctor", f"```text\n{_doctor_help()}\n```"]
    return "\n\n".join(parts) + "\n"


def _table(kind: type, names: list[str]) -> str:
    fields, hints = {f.name: f for f in dataclasses.fields(kind)}, typing.get_type_hints(kind)
    rows = []
    for name in names:
        also = "".join(f"<br>also <code>--{alias}</code>" for alias, (of, _) in ALIASES.items() if of == name)
        values, default = _values(hints[name]), _default(fields[name])
        if kind is TrainArguments:
            own = {f.name: f for f in dataclasses.fields(PretrainArguments)}[name]
            if own.default != fields[name].default:
                default += f"<br>pretrain: {_default(own)}"
        text = _prose(fields[name].metadata["help"])
        flag = f'<a href="#{_anchor(kind, name)}"><code>--{name}</code></a>{also}'
        rows.append(f'<tr id="{_anchor(kind, name)}"><td>{flag}</td><td>{values}</td><td>{default}</td><td>{text}</td></tr>')
    head = "<tr><th>flag</th><th>value</th><th>default</th><th>meaning</th></tr>"
    return f'<table class="flags"><thead>{head}</thead><tbody>\n' + "\n".join(rows) + "\n</tbody></table>"


def _anchor(kind: type, name: str) -> str:
    before = FinetuneArguments if kind is RerankArguments else TrainArguments
    redefined = kind is not before and name in before.__annotations__
    return f"{kind.command.removeprefix('bge_ds.')}-{name}" if redefined else name


def _values(hint: object) -> str:
    options = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Literal:
        return ", ".join(f"<code>{escape(str(option))}</code>" for option in options)
    if typing.get_origin(hint) is list:
        return f"{_values(options[0])} ..."
    if dict in options:
        return "JSON"
    if options:  # a union: None is said by the default
        return " or ".join(dict.fromkeys(_values(option) for option in options if option is not type(None)))
    return {bool: "switch", int: "integer", float: "number", str: "text", dict: "JSON"}[hint]


def _default(field: dataclasses.Field) -> str:
    if field.default_factory is not dataclasses.MISSING:
        return "none"
    if field.default is dataclasses.MISSING:
        return "<b>required</b>"
    return "unset" if field.default is None else f"<code>{escape(str(field.default))}</code>"


def _preprocess() -> list[str]:
    (commands,) = (a for a in preprocess._parser()._actions if isinstance(a, argparse._SubParsersAction))
    by_kind = {kind: {a.dest: a for a in commands.choices[kind]._actions} for kind in ("finetune", "pretrain")}
    union = by_kind["finetune"] | by_kind["pretrain"]
    only = {name: kind for name in union for kind in by_kind if all(name not in by_kind[o] for o in by_kind if o != kind)}
    parts = ["### preprocess finetune, preprocess pretrain", _argparse_table(union.values(), "preprocess", only)]
    for name in (name for name in commands.choices if name not in by_kind):
        parts += [f"### preprocess {name}", _argparse_table(commands.choices[name]._actions, name)]
    return parts


def _argparse_table(actions: typing.Iterable[argparse.Action], command: str, only: dict[str, str] | None = None) -> str:
    rows = []
    for action in actions:
        if action.help == argparse.SUPPRESS or isinstance(action, argparse._HelpAction):
            continue
        names = [option for option in action.option_strings if "-" not in option.removeprefix("--")] or [action.dest]
        also = "".join(f"<br>also <code>{escape(alias)}</code>" for alias in names[1:])
        notes = ["<b>required</b>"] * bool(action.required and action.option_strings)
        notes += [f"<code>{escape(str(action.default))}</code>"] if action.nargs != 0 and action.default else []
        notes += [f"{only[action.dest]} only"] if only and action.dest in only else []
        cells = (
            f"<code>{escape(names[0])}</code>{also}",
            _action_values(action),
            "<br>".join(notes),
            _prose(action.help or ""),
        )
        rows.append(f'<tr id="{command}-{action.dest}">' + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    head = "<tr><th>flag</th><th>value</th><th>default</th><th>meaning</th></tr>"
    return f'<table class="flags"><thead>{head}</thead><tbody>\n' + "\n".join(rows) + "\n</tbody></table>"


def _action_values(action: argparse.Action) -> str:
    if action.nargs == 0:
        return "switch"
    if action.choices:
        return ", ".join(f"<code>{escape(str(choice))}</code>" for choice in action.choices)
    if isinstance(action.metavar, str):
        value = escape(action.metavar)
    else:
        value = "integer" if action.type and type(action.type("1")) is int else "text"
    return f"{value} ..." if action.nargs == "+" else value


def _prose(text: str) -> str:
    """A help text as HTML: what stands between backticks, and names of flags, is code."""
    parts = re.split(r"(`[^`]+`|--[a-z]\w*)", text.replace("%%", "%"))
    return "".join(f"<code>{escape(part.strip('`'))}</code>" if n % 2 else escape(part) for n, part in enumerate(parts))


def _doctor_help() -> str:
    """`--help` as it is printed, 100 columns wide."""
    printed, before = io.StringIO(), os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "100"
    try:
        with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
            doctor.parse(["--help"])
    finally:
        os.environ.pop("COLUMNS") if before is None else os.environ.update(COLUMNS=before)
    return printed.getvalue().rstrip()


# ------------------------------------------------------------------------------------- the names of TrainingArguments


def refused() -> str:
    from transformers import TrainingArguments

    ours = {f.name for kind in (PretrainArguments, FinetuneArguments, RerankArguments) for f in dataclasses.fields(kind)}
    theirs = [f.name for f in dataclasses.fields(TrainingArguments)]
    honoured = ", ".join(f"[`{name}`](flags.md#{name})" for name in theirs if name in ours)
    aliases = "\n".join(f"| `--{alias}` | [`--{name}`](flags.md#{name}) |" for alias, (name, _) in ALIASES.items())
    reasons: dict[str, list[str]] = {}
    for name, reason in REFUSED.items():
        reasons.setdefault(reason, []).append(name)
    rows = "\n".join(
        f"<tr><td>{'<br>'.join(f'<code>--{name}</code>{_passes(name)}' for name in names)}</td><td>{_prose(reason)}</td></tr>"
        for reason, names in reasons.items()
    )
    return f"""## Honoured

These have the meaning that they have there: {honoured}.

## Aliases

| name | sets |
|---|---|
{aliases}

## Refused

A refused name is accepted where its value asks for what happens anyway: unset, `False`, or a value that the table names. Any
other value stops the run with the reason: a setting that is silently ignored costs a training run before anyone notices.

<table class="flags"><thead><tr><th>name</th><th>reason</th></tr></thead><tbody>
{rows}
</tbody></table>

A name that only the installed version of transformers has is refused likewise, unless it is given its default.
"""


def _passes(name: str) -> str:
    """The values with which a refused name passes, where they are not the usual ones."""
    values = [str(value) for value in accepted(name) if value not in (None, False, "")]
    return f" ({' or '.join(f'<code>{escape(value)}</code>' for value in values)} is accepted)" if values else ""
