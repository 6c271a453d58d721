"""The documentation: the site builds without a warning, and what it says of flags, files and modules is there."""

from __future__ import annotations

import html
import math
import os
import re
import runpy
import statistics
import subprocess
import sys
from pathlib import Path

import helpers
import pytest

from bge_ds import encode, evaluate, export, merge, mine, preprocess, score
from bge_ds.config.arguments import FinetuneArguments, PretrainArguments, RerankArguments, parse
from bge_ds.config.huggingface_names import ALIASES, REFUSED
from bge_ds.doctor import __main__ as doctor

REPO = helpers.REPO
PAGES = sorted((REPO / "docs").glob("*.md"))
GUIDES = [REPO / "README.md", *PAGES]
WRITTEN = [REPO / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "benchmarks/README.md")] + PAGES
COMMANDS = {
    "pretrain": lambda: parse(PretrainArguments, ["--help", "all"]),
    "finetune": lambda: parse(FinetuneArguments, ["--help", "all"]),
    "rerank": lambda: parse(RerankArguments, ["--help", "all"]),
    **{
        f"preprocess {name}": lambda name=name: preprocess._parser().parse_args([name, "--help"])
        for name in ("pretrain", "finetune", "merge", "inspect", "verify")
    },
    "evaluate": lambda: evaluate.main(["--help"]),
    "encode": lambda: encode.main(["--help"]),
    "score": lambda: score.main(["--help"]),
    "merge": lambda: merge.main(["--help"]),
    "mine": lambda: mine.main(["--help"]),
    "export": lambda: export.main(["--help"]),
    "doctor": lambda: doctor.parse(["--help"]),
}
# Flags of other programs that the pages show: launchers, mkdocs, and scripts of launch/ and benchmarks/.
OF_OTHERS = {"num_gpus", "module", "nproc_per_node", "strict", "help"}
# A number, with commas between thousands, an exponent, or " M" for a million.
NUMBER = re.compile(r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:e[+-]\d+)?(?: M\b)?")
PAGES_OF_OTHER_FLAGS = {"benchmarks.md", "flagembedding.md"}  # of the benchmarks' scripts, and of FlagEmbedding


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The built site. `--strict`: a link, anchor or page of the navigation that is not there fails the build."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(
        command, cwd=REPO, capture_output=True, text=True, timeout=240, env={**os.environ, "PYTHONPATH": str(REPO)}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def flags_of_help(command, capsys) -> set[str]:
    """The flags that `--help` prints, by the names that they have with underscores."""
    with pytest.raises(SystemExit) as end:
        command()
    assert end.value.code == 0
    printed = capsys.readouterr().out
    spelled = {flag for line in printed.splitlines() if re.match(r" {2}-", line) for flag in re.findall(r"--[a-z][\w-]*", line)}
    return {flag.removeprefix("--").replace("-", "_") for flag in spelled} - {"help"}


def test_the_core_to_read_first_is_short_and_there():
    """CONTRIBUTING promises a core that is read in an afternoon: its files exist and have at most 4,500 lines together."""
    text = (REPO / "CONTRIBUTING.md").read_text(encoding="utf-8")
    core = re.findall(r"(?m)^\| `(bge_ds/[\w/]+\.py)` \| ", text.split("## The map")[0])
    assert len(core) > 10 and len(set(core)) == len(core)
    assert sum(len((REPO / path).read_text(encoding="utf-8").splitlines()) for path in core) <= 4500


def test_every_folder_of_the_package_is_in_the_map():
    """A folder that the map does not name has no owner."""
    text = (REPO / "CONTRIBUTING.md").read_text(encoding="utf-8").split("## The map")[1]
    folders = {path.parent.relative_to(REPO) for path in (REPO / "bge_ds").rglob("__init__.py")} - {Path("bge_ds")}
    places = " ".join(line.split("|")[1] for line in text.splitlines() if line.startswith("| "))
    assert not [str(folder) for folder in folders if f"{str(folder).removeprefix('bge_ds/')}/`" not in places]


def test_every_page_is_built(site):
    """No page is written and then left out of the site, and README is its start."""
    built = {path.stem for path in site.glob("*.html")}
    assert {path.stem for path in PAGES} <= built
    assert {"index", "flags", "training-arguments", "contributing", "changelog", "security", "measuring"} <= built
    assert "Two commands" in (site / "index.html").read_text(encoding="utf-8")


def test_the_site_loads_nothing_from_other_servers(site):
    """The site is read on machines without a network: scripts, styles and pictures lie in it."""
    for page in site.glob("*.html"):
        text = page.read_text(encoding="utf-8")
        loaded = re.findall(r'<(?:script|img|iframe)\b[^>]* src="([^"]+)"', text)
        for link in re.findall(r"<link\b[^>]*>", text):
            loaded += re.findall(r' href="([^"]+)"', link) if 'rel="stylesheet"' in link else []
        assert loaded, page
        assert not [source for source in loaded if "//" in source], page
        assert [source for source in loaded if not (site / source.split("?")[0].lstrip("/")).is_file()] == [], page


@pytest.mark.parametrize("name", COMMANDS)
def test_every_flag_is_in_the_reference(name, site, capsys):
    """A flag that `--help` prints has an entry on the page of flags, which can therefore not go stale."""
    page = html.unescape(re.sub(r"<[^>]+>", " ", (site / "flags.html").read_text(encoding="utf-8")))
    shown = set(re.findall(r"--([a-z]\w*)", page))
    flags = flags_of_help(COMMANDS[name], capsys)
    assert flags or name == "preprocess verify"
    off = {flag for flag in flags if flag.startswith("no_") and flag.removeprefix("no_") in flags}  # told once for all
    assert flags - off - shown == set()


def test_the_reference_says_what_help_says(site):
    """Meaning, default and values on the page are those of the arguments, for a flag of each kind."""
    page = (site / "flags.html").read_text(encoding="utf-8")
    entries = {name: re.sub(r"<[^>]+>", " ", row) for name, row in re.findall(r'<tr id="([^"]+)">(.*?)</tr>', page, re.S)}
    help_of = {f.name: f.metadata["help"] for f in FinetuneArguments.__dataclass_fields__.values() if f.metadata}
    for name, value in (("learning_rate", "5e-05"), ("kd_loss_type", "margin_mse"), ("use_inbatch_neg", "True")):
        entry = " ".join(html.unescape(entries[name]).split())
        assert value in entry and help_of[name] in entry
    assert "required" in entries["output_dir"] and "epoch" in entries["pretrain-save_strategy"]
    assert "--normlized" in entries["normalize_embeddings"]


@pytest.mark.parametrize("path", [path for path in GUIDES if path.name not in PAGES_OF_OTHER_FLAGS], ids=lambda path: path.name)
def test_the_guides_name_real_flags_only(path, capsys):
    """A flag that is renamed or removed in the code must be so in the guides, too."""
    known = OF_OTHERS | set(ALIASES) | set(REFUSED) | set(mine.ALIASES) | set(mine.REFUSED)
    known |= {flag for command in COMMANDS.values() for flag in flags_of_help(command, capsys)}
    named = re.findall(r"(?<![\w-])--([a-z][\w-]*)", path.read_text(encoding="utf-8"))
    assert {flag.replace("-", "_") for flag in named} - known == set()


def test_the_readme_is_short():
    """The README is read before anything else; what needs more room has a page."""
    assert len((REPO / "README.md").read_text(encoding="utf-8").splitlines()) <= 200


@pytest.mark.parametrize("path", WRITTEN, ids=lambda path: str(path.relative_to(REPO)))
def test_links_lead_to_files(path):
    """Links work in the repository, without the site: each relative one leads to a file or folder that is there."""
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target or target.startswith("#"):
            continue
        found = Path(os.path.normpath(path.parent / target.split("#")[0]))
        assert found.exists(), f"{path.name}: {target}"


@pytest.mark.parametrize("path", GUIDES, ids=lambda path: path.name)
def test_scripts_and_files_named_are_there(path):
    """`launch/...`, `benchmarks/...` and `examples/...` in the text are files of the repository."""
    written = {"launch/.deepspeed_env"}  # by the user
    named = re.findall(r"(?<![\w/.])((?:launch|benchmarks|examples|docs)/[\w./-]*\w)", path.read_text(encoding="utf-8"))
    assert [name for name in named if name not in written and not (REPO / name).exists()] == []


def test_pictures_are_those_of_their_script():
    """A picture changed by hand, or a script changed without drawing again, would leave the two apart."""
    drawing = runpy.run_path(str(REPO / "docs/pictures/draw.py"))
    for name, draw in drawing["PICTURES"].items():
        assert (REPO / "docs/pictures" / name).read_text(encoding="utf-8") == draw().svg(), f"{name}: run docs/pictures/draw.py"


def test_modules_of_the_drawings_and_the_map_are_there():
    """The drawings and CONTRIBUTING name modules that exist."""
    drawn = "".join(path.read_text(encoding="utf-8") for path in (REPO / "docs/pictures").glob("*.svg"))
    modules = {path.name for path in (REPO / "bge_ds").rglob("*.py")}
    named = re.findall(r">(\w+\.py)<", drawn)
    assert len(named) > 10 and set(named) <= modules
    written = re.findall(r"`((?:bge_ds/)?[a-z_/]+/\w+\.py)`", (REPO / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    places = [name if name.startswith(("bge_ds/", "docs/", "tests/")) else f"bge_ds/{name}" for name in written]
    assert len(places) > 20 and not [place for place in places if not (REPO / place).is_file()]


def test_readme_commands_are_those_of_the_scripts():
    """README's two scripts can be run, and its training commands have the flags of the launch scripts, with their values."""
    text = (REPO / "README.md").read_text(encoding="utf-8")
    for script in ("launch/quickstart.sh", "launch/test.sh"):
        assert re.search(rf"^\./{script} ", text, re.M) and os.access(REPO / script, os.X_OK)
    for name, kind in (("pretrain", PretrainArguments), ("finetune", FinetuneArguments)):
        (shown,) = re.findall(rf"^deepspeed --num_gpus 2 -m bge_ds\.{name} (.*?)^```", text, re.M | re.DOTALL)
        words = shown.replace("\\\n", " ").split()
        assert parse(kind, words).output_dir == "out"
        script = (REPO / f"launch/{name}.sh").read_text(encoding="utf-8")
        pairs = re.findall(r"(--\w+)((?: [^-\s]\S*)*)", " ".join(words))
        given = [pair for pair in pairs if pair[0] not in ("--output_dir", "--train_data")]
        assert len(given) >= 4
        assert [flag + value for flag, value in given if f"    {flag}{value} \\\n" not in script] == []


def numbers(text: str) -> list[str]:
    return NUMBER.findall(text)


def value(number: str) -> float:
    return float(number.removesuffix(" M").replace(",", "")) * (1e6 if number.endswith(" M") else 1)


def unit(number: str) -> float:
    """What the last digit shown stands for; zeros at the end of 10,000 or more are taken for rounding."""
    plain = number.removesuffix(" M").replace(",", "")
    digits = len(plain.partition(".")[2])
    if not digits and len(plain) > 4:
        digits = len(plain.rstrip("0")) - len(plain)
    return 10.0**-digits * (1e6 if number.endswith(" M") else 1)


def rows_of(section: str) -> list[list[str]]:
    """Cells of all tables of a section, without heads; figures begin in the second column."""
    lines = [line for line in section.splitlines() if line.startswith("|")]
    marks = {i for i, line in enumerate(lines) if re.fullmatch(r"[|\s:-]+", line)}
    heads = {i - 1 for i in marks}
    return [line.strip("| ").split("|")[1:] for i, line in enumerate(lines) if i not in marks | heads]


def sections_with_rows() -> list[tuple[str, str, list[str]]]:
    text = "\n".join((REPO / f"docs/{name}.md").read_text(encoding="utf-8") for name in ("benchmarks", "recipe"))
    parts = re.split(r"^##+ (.*)$", text, flags=re.M)[1:]
    pairs = zip(parts[::2], parts[1::2], strict=True)
    return [(title, body, files) for title, body in pairs if (files := re.findall(r"`benchmarks/(\w+\.csv)`", body))]


@pytest.mark.parametrize(("title", "body", "files"), [pytest.param(*s, id=s[0]) for s in sections_with_rows()])
def test_figures_stand_in_the_rows(title, body, files):
    """Every figure of a benchmark's table is one of its CSV file, rounded, the mean of the figures in the cell after it, or the
    quotient of two figures of its line.

    A figure changed in the text alone, or a row measured again, leaves the two apart.
    """
    rows = " ".join((REPO / "benchmarks" / name).read_text(encoding="utf-8").replace(",", " ") for name in files)
    known = [value(n) for n in numbers(rows)]
    shown, wrong = [], []
    for cells in rows_of(body):
        cells = [re.sub(r"`[^`]*`|\*\*", "", cell).strip() for cell in cells]
        found = [numbers(cell) for cell in cells]
        shown += [n for cell in found for n in cell]
        means = [statistics.mean(map(value, cell)) if len(cell) > 1 else math.nan for cell in found[1:]]
        for cell, mean in zip(found, means, strict=False):
            if len(cell) == 1 and abs(mean - value(cell[0])) <= 0.5001 * unit(cell[0]):
                cell.clear()
        wrong += [n for cell in found for n in cell if not any(abs(v - value(n)) <= 0.5001 * unit(n) for v in known)]
        if wrong and re.fullmatch(r"[\d.,]+( x)?", cells[-1]):  # a quotient that no row holds
            others = [value(n) for cell in found[:-1] for n in cell]
            quotients = [a / b for a in others for b in others]
            (last,) = found[-1]
            if last in wrong and any(abs(q - value(last)) <= max(0.5001 * unit(last), 0.01 * q) for q in quotients):
                wrong.remove(last)
    assert len(shown) >= 5 and not wrong


def test_the_figures_of_readme_are_those_of_the_pages():
    """README repeats figures of the pages on benchmarks and the quickstart; they must not drift apart."""
    readme = (REPO / "README.md").read_text(encoding="utf-8")
    pages = {name: (REPO / f"docs/{name}.md").read_text(encoding="utf-8") for name in ("benchmarks", "quickstart")}
    measured = readme.partition("\n## Measured\n")[2].partition("\n## ")[0]
    bold = re.findall(r"\*\*([\d,.]+)", measured)
    assert len(bold) >= 6 and [n for n in bold if n not in pages["benchmarks"]] == []
    table = readme.partition("\n## Two commands\n")[2].partition("\n## ")[0]
    lines = [line for line in table.splitlines() if line.startswith("|")]
    assert len(lines) == 8 and "\n".join(lines) in pages["quickstart"]
