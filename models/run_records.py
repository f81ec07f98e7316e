"""What this user's cache records of each run that began here: the folders and files that the command line named.

A checkpoint and a config.json name such places too, but somebody else may have written them. What reads them uses the
record of the run instead, and without one asks for a flag.
"""

import hashlib
import json
import logging
import os
from dataclasses import fields
from pathlib import Path
from typing import Any

from config import GROUPS, Config
from utils.errors import UserError
from utils.files import cache_folder, write_json
from utils.schema import ANY, check
from utils.untrusted import read_json

logger = logging.getLogger("minbert")

RECORD = {"pretrained": str | None, "data_dir": str, "dev": {ANY: str}}


def record_file(config: Config) -> Path:
    """Return the file of a run's record: its name is the hash of the options, where and on what it runs apart.

    Options that have their defaults do not count, so that a version with more options finds the file too.
    """
    groups = {name: getattr(config, name) for name in GROUPS if name not in ("run", "compute")}
    groups |= {f"tasks.{name}": options for name, options in config.tasks.items()}
    changed = {
        f"{name}.{spec.name}": value
        for name, options in groups.items()
        for spec in fields(options)
        if (value := getattr(options, spec.name)) != spec.default
    }
    digest = hashlib.sha256(json.dumps(changed, sort_keys=True).encode()).hexdigest()
    return cache_folder() / "runs" / f"{digest[:32]}.json"


def record(config: Config) -> None:
    """Record the places of a run: the folder of its start weights if it is one, and those of its dev files."""
    folder = os.path.expanduser(config.model.pretrained)
    content = {
        "pretrained": os.path.abspath(folder) if os.path.isdir(folder) else None,
        "data_dir": os.path.abspath(config.data.data_dir),
        "dev": {name: os.path.abspath(options.dev) for name, options in config.tasks.items() if options.dev},
    }
    try:
        write_json(record_file(config), content)
    except UserError as error:
        logger.info("--evaluate and report.py will need --pretrained and --data_dir for this run: %s", error)


def recorded(config: Config) -> dict[str, Any] | None:
    """Return the places of a run with these options, or None if no such run began here."""
    try:
        return dict(check(read_json(record_file(config)), RECORD, "it"))
    except (OSError, ValueError, UserError):
        return None
