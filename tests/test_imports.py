"""House rules on imports: their direction, and a light registration."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FORBIDDEN = {
    "diffusion_prior": {"nerfstudio", "gsplat", "nerfstudio_enhancer", "method_configs"},
    "nerfstudio_enhancer": {"method_configs"},
}


def imported_packages(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("package", sorted(FORBIDDEN))
def test_imports_go_one_way(package: str) -> None:
    files = list((ROOT / package).rglob("*.py"))
    assert files
    wrong = {str(path): imported_packages(path) & FORBIDDEN[package] for path in files}
    assert not {path: names for path, names in wrong.items() if names}


@pytest.mark.slow
def test_registration_imports_neither_diffusion_libraries_nor_native_code() -> None:
    code = (
        "import sys\n"
        "from method_configs.enhancer import enhancer_method, enhancer_svd_method\n"
        "from method_configs.sparse_views import sparse_views_dataparser\n"
        "heavy = sorted({'diffusers', 'transformers', 'pycolmap', 'lpips', 'ray', 'accelerate'} & set(sys.modules))\n"
        "maps = open('/proc/self/maps').read() if sys.platform == 'linux' else ''\n"
        "native = [line for line in maps.splitlines() if 'nerfstudio_enhancer/rasterize' in line]\n"
        "names = [method.config.method_name for method in (enhancer_method, enhancer_svd_method)]\n"
        "print(*names, heavy, native)\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert out.stdout.strip().splitlines()[-1] == "3dgs-enhancer 3dgs-enhancer-svd [] []"


@pytest.mark.slow
def test_a_broken_installation_of_ours_leaves_the_other_methods_usable() -> None:
    code = (
        "import sys\n"
        "sys.modules['nerfstudio_enhancer.model'] = None  # importing it now raises ImportError\n"
        "from nerfstudio.configs.method_configs import all_methods\n"
        "print('splatfacto' in all_methods, any('3dgs-enhancer' in name for name in all_methods))\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert out.returncode == 0, out.stderr[-2000:]
    assert out.stdout.strip().splitlines()[-1] == "True False"
