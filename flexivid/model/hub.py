"""Where an adapter lies: a folder, or the three files of a hub repository, fetched into the hub's cache."""

import os
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from flexivid.model.adapter import CONFIG_NAME, LORA_NAME, WEIGHTS_NAME, AdapterError
from flexivid.shipped import shipped_path

LOG_IN = "log in (`hf auth login`) or give a token"


def locate_adapter(
    adapter: str | os.PathLike,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | bool | None = None,
) -> Path:
    """The local folder of an adapter given as a folder or as a hub id.

    Args:
        adapter: a folder, or a hub id such as `someone/adapter`.
        revision: branch, tag or commit of a hub id.
        subfolder: of the folder or the repository, in which the adapter lies.
        token: of the hub; by default that of the login. A folder needs none.

    Raises:
        AdapterError: it is neither; or the hub has it not, does not give it to this user, or cannot be reached.
    """
    folder = shipped_path(Path(adapter))
    if folder.is_dir():
        if revision is not None:
            raise AdapterError(f"a revision is of a hub id, and {adapter} is a folder")
        return folder / (subfolder or "")
    neither = AdapterError(f"no adapter at {adapter}: it is neither a folder nor a hub id")
    if folder.exists() or str(adapter).count("/") != 1:
        raise neither
    try:
        folder = _fetch(str(adapter), revision, subfolder, token)
    except HFValidationError:
        raise neither from None
    if not (folder / CONFIG_NAME).is_file():
        where = f"{adapter}/{subfolder}" if subfolder else adapter
        raise AdapterError(f"{where} is on the hub, but is no flexivid adapter: it has no {CONFIG_NAME}")
    return folder


def _fetch(hub_id: str, revision: str | None, subfolder: str | None, token: str | bool | None) -> Path:
    """The folder in the hub's cache. Raises AdapterError, and HFValidationError for what cannot be a hub id."""
    names = [f"{subfolder}/{name}" if subfolder else name for name in (CONFIG_NAME, WEIGHTS_NAME, LORA_NAME)]
    why = f"no folder {hub_id}, and "
    try:
        found = snapshot_download(hub_id, revision=revision, token=token, allow_patterns=names)
    except HFValidationError:
        raise
    except GatedRepoError:
        why += f"on the hub its owner decides who may have it: ask for access on its page, then {LOG_IN}"
    except RepositoryNotFoundError:
        why += f"the hub has none of that name, or it is private: then {LOG_IN}"
    except RevisionNotFoundError:
        why = f"{hub_id} on the hub has no revision {revision}"
    except LocalEntryNotFoundError as error:  # which is raised from what hindered
        why += f"the hub cannot be asked, nor is it in the cache: {error.__cause__ or error}"
    except Exception as error:  # of the network, the disk or the hub
        why += f"it could not be fetched from the hub: {error}"
    else:
        return Path(found, subfolder or "")
    raise AdapterError(why)
