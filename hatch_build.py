"""Build hook: compile the launcher and ship it in the wheel.

Without a C compiler the wheel is still made, pure and without the launcher; root mode then refuses to start and says
how to get it. A build that must not end like that sets PACTOWN_REQUIRE_LAUNCHER=1.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

FOLDER = Path("pactown_runner/launcher")


def _load_build(root: Path) -> ModuleType:
    # By path: importing the package would need its dependencies, which an isolated build does not have.
    spec = importlib.util.spec_from_file_location("pactown_launcher_build", root / FOLDER / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class LauncherBuildHook(BuildHookInterface[Any]):
    """Compiles `launch.c` for wheels, editable ones too; a source distribution carries the source."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile the launcher and mark the wheel as made for this machine."""
        del version
        if self.target_name != "wheel":
            return
        build = _load_build(Path(self.root))
        try:
            launcher = build.build()
        except (build.BuildError, OSError) as error:
            if os.environ.get("PACTOWN_REQUIRE_LAUNCHER") == "1":
                raise
            self.app.display_warning(f"the wheel has no launcher, so it has no root mode: {error}")
            return
        build_data["pure_python"] = False
        # The launcher is static and calls the kernel only: any libc and any Python 3 will do.
        machine = build.machine_of(launcher)
        build_data["tag"] = f"py3-none-manylinux_2_17_{machine}.musllinux_1_1_{machine}"
        build_data["artifacts"].append(f"{FOLDER}/launch")
