"""Imports go downward only, and the engine stays free of what a bare PyTorch machine lacks."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import framecap

PACKAGE = Path(framecap.__file__).parent
# A layer may import itself and every layer above it in this list.
LAYERS = [
    {"errors", "schema", "_root"},
    {
        "manifest",
        "storage",
        "stores",
        "settings",
        "shards",
        "row_batches",
        "row_values",
        "text_columns",
        "ray_cluster",
    },
    {"model"},
    {
        "pipeline",
        "training",
        "bench",
        "pack",
        "pack_sources",
        "video",
        "verify",
        "report",
        "notebook",
        "importance",
        "search",
        "status",
        "pairs",
    },
    {"demo"},
    {"cli"},
    {"reference"},
]
ENGINE_MAY_IMPORT = {
    "torch",
    "tokenizers",
    "safetensors",
    "PIL",
    "numpy",
    "simplejpeg",
    "framecap",
}
HUB = re.compile(r"huggingface\.co|hf_hub_download|snapshot_download|torch\.hub|from_pretrained\(\s*['\"]")


def level(module: str) -> int:
    return next(i for i, layer in enumerate(LAYERS) if module in layer)


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def home(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    return (
        "_root"
        if relative.name == "__init__.py" and len(relative.parts) == 1
        else relative.parts[0].removesuffix(".py")
    )


def test_no_module_imports_a_layer_above_its_own() -> None:
    upward = []
    for path in PACKAGE.rglob("*.py"):
        if home(path) == "_root":
            continue
        for name in imported(path):
            parts = name.split(".")
            ours = parts[0] == "framecap" and len(parts) > 1 and any(parts[1] in layer for layer in LAYERS)
            if ours and level(parts[1]) > level(home(path)):
                upward.append(f"{path.relative_to(PACKAGE)} imports {name}")
    assert upward == []


def test_the_engine_imports_only_what_a_bare_pytorch_machine_has() -> None:
    foreign = [
        f"{path.name} imports {name}"
        for path in (PACKAGE / "model").glob("*.py")
        for name in imported(path)
        if name.split(".")[0] not in ENGINE_MAY_IMPORT | set(sys.stdlib_module_names)
    ]
    assert foreign == []


def test_importing_the_captioner_loads_neither_ray_nor_pyarrow_nor_pydantic() -> None:
    code = (
        "import sys, framecap.model.captioner, framecap.model.convert;"
        "print([m for m in ('ray', 'pyarrow', 'pydantic') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "[]"


def test_captioning_imports_no_transformers() -> None:
    """It takes seconds, and is there as the reference of tests and benchmark alone."""
    code = (
        "import sys, framecap.model.convert; from PIL import Image; from framecap import describe_image;"
        "assert describe_image(Image.new('RGB', (80, 60)));"
        "print([m for m in sys.modules if m.partition('.')[0] == 'transformers'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "[]"


def test_no_code_path_names_a_model_hub() -> None:
    sources = [*PACKAGE.rglob("*.py"), *(PACKAGE.parent / "jobs").glob("*.py")]
    named = [str(path) for path in sources if HUB.search(path.read_text(encoding="utf-8"))]
    assert named == []
