"""A policy's settings in a YAML file, as the command line takes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from monitoring.errors import PolicyError

__all__ = ["read_settings"]


def read_settings(path: Path) -> dict[str, Any]:
    """The settings in a file, not checked yet.

    Raises:
        PolicyError: it cannot be read, or does not hold settings.
    """
    import yaml

    try:
        settings = yaml.safe_load(path.read_text()) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise PolicyError(f"{path}: {' '.join(str(error).split())}") from None
    if not isinstance(settings, dict) or "policy" in settings:
        raise PolicyError(
            f"{path}: it must hold the settings themselves, such as 'mirror_rate: 0.5', with no 'policy:' above"
        )
    return settings
