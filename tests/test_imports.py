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
    {"errors", "schema", "console", "_root"},
    {
        "manifest",
        "scratch",
        "storage",
        "stores",
        "settings",
        "shards",
        "row_batches",
        "page_sizes",
        "row_values",
        "text_columns",
        "ray_cluster",
    },
    {"model"},
    {"image_uris"},
    {
        "pipeline",
        "training",
        "bench",
        "pack",
        "pack_sources",
        "video",
        "verify",
        "verify_ids",
        "verify_rows",
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


def test_no_module_imports_itself_by_way_of_others() -> None:
    """Inside packages too, and imports inside functions count."""
    modules = {
        ".".join(("framecap", *path.relative_to(PACKAGE).with_suffix("").parts)): path for path in PACKAGE.rglob("*.py")
    }
    graph = {name: imported(path) & modules.keys() - {name} for name, path in modules.items()}
    while leaves := [name for name, below in graph.items() if not below & graph.keys()]:
        for name in leaves:
            del graph[name]
    assert {name: sorted(below & graph.keys()) for name, below in graph.items()} == {}


def test_the_engine_imports_only_what_a_bare_pytorch_machine_has() -> None:
    foreign = [
        f"{path.name} imports {name}"
        for path in (PACKAGE / "model").glob("*.py")
        for name in imported(path)
        if name.split(".")[0] not in ENGINE_MAY_IMPORT | set(sys.stdlib_module_names)
    ]
    assert foreign == []


def loaded(code: str, *packages: str) -> set[str]:
    """Which of ``packages`` a fresh interpreter has imported after ``code``."""
    program = f"{code}\nimport sys; print(*{{name.partition('.')[0] for name in sys.modules}} & set({packages!r}))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=300)
    return set(done.stdout.split())


def test_importing_the_captioner_loads_neither_ray_nor_pyarrow_nor_pydantic() -> None:
    code = "import framecap.model.captioner, framecap.model.convert"
    assert loaded(code, "torch", "ray", "pyarrow", "pydantic") == {"torch"}


def test_captioning_imports_no_transformers() -> None:
    """It takes seconds, and is there as the reference of tests and benchmark alone."""
    code = (
        "import framecap.model.convert, framecap.pipeline.stages\n"
        "from PIL import Image; from framecap import describe_image\n"
        "assert describe_image(Image.new('RGB', (80, 60)))"
    )
    assert loaded(code, "torch", "ray", "transformers") == {"torch", "ray"}


def test_driver_and_readers_import_no_torch() -> None:
    """It takes seconds and 200 MB, in the driver and in every reader."""
    code = (
        "from pathlib import Path; import framecap.pipeline.run, framecap.pipeline.caption\n"
        "from framecap.model.captioner_config import check_options\n"
        "from framecap.model.decode_options import DecodeOptions\n"
        "check_options(Path(framecap.__file__).parent / 'demo' / 'mini', DecodeOptions())"
    )
    assert loaded(code, "ray", "torch", "transformers") == {"ray"}


def test_importing_framecap_loads_no_library() -> None:
    assert loaded("import framecap", "numpy", "PIL", "pyarrow", "torch", "ray") == set()


def test_no_code_path_names_a_model_hub() -> None:
    sources = [*PACKAGE.rglob("*.py"), *(PACKAGE.parent / "jobs").glob("*.py")]
    named = [str(path) for path in sources if HUB.search(path.read_text(encoding="utf-8"))]
    assert named == []
