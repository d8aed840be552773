"""Rows through the datasets library: parquet, saved directories, hub ids."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
from datasets import packaged_modules

from rlhf.config.sections import SourceSection
from rlhf.data.settings import NOT_REACHED, refuse_settings
from rlhf.errors import Problem, RlhfError
from rlhf.hub import connection, names

FILE_SUFFIXES = {".parquet", ".csv", ".json", ".tsv", ".txt", ".arrow", ".gz", ".zst", ".zip"}


def read(data: SourceSection) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, row) of each row.

    Raises:
        RlhfError: DAT010 where nothing of this name can be loaded, or the split is not named and there are several,
            DAT015 where the hub cannot be reached.
    """
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    path = Path(data.path)
    try:
        if path.is_dir() and ((path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file()):
            refuse_settings(data, "a saved data set", "name", "revision")
            found = datasets.load_from_disk(str(path))
        elif path.is_file() and path.suffix == ".parquet":
            refuse_settings(data, "a parquet file", "name", "split", "revision")
            found = datasets.load_dataset("parquet", data_files=str(path))
        elif not path.exists() and data.path in packaged_modules._PACKAGED_DATASETS_MODULES:
            what = "is a format of the datasets library, which would read whatever files stand here."
            raise RlhfError(Problem("DAT010", data.path, what, "name the file"))
        elif path.exists() or (names.HUB_ID.fullmatch(data.path) and path.suffix not in FILE_SUFFIXES):
            away = None if path.exists() else connection.trouble()
            found = datasets.load_dataset(data.path, data.name, revision=data.revision)
            if away:
                connection.say_cached(data.path)
        else:
            raise RlhfError(Problem("DAT010", data.path, "no such file.", "check the path"))
    except RlhfError:
        raise
    except ConnectionError:
        revision = f" --revision {data.revision}" if data.revision else ""
        download = f"hf download {data.path} --repo-type dataset{revision}"
        raise RlhfError(connection.not_reached(NOT_REACHED, data.path, download)) from None
    except Exception as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise RlhfError(
            Problem("DAT010", data.path, f"cannot be loaded: {first}", "name a file, or a hub id while online")
        ) from None
    if isinstance(found, datasets.DatasetDict):
        split = data.split or (next(iter(found)) if len(found) == 1 else None)
        if split not in found:
            what = f"splits are {', '.join(found)}; {'none is named' if data.split is None else f'no {data.split}'}."
            raise RlhfError(Problem("DAT010", data.path, what, f"split: {next(iter(found))}, or another of them"))
        found = found[split]
    elif data.split is not None:
        refuse_settings(data, "a data set saved without splits", "split")
    for index, row in enumerate(found):
        yield f"{data.path}[{index}]", {key: value for key, value in row.items() if value is not None}
