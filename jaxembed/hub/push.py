"""Push an exported folder to a repository of the Hugging Face hub.

huggingface_hub reads the token from the environment (HF_TOKEN) or from `hf auth login`. It is never written.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path

from jaxembed.errors import UserError, summarize
from jaxembed.hub.folders import is_hub_id

REFUSED_STATUSES = (401, 403)
TOKENS_PAGE = "https://huggingface.co/settings/tokens"


@dataclasses.dataclass(frozen=True)
class PushTarget:
    """The repository to push to.

    Attributes:
        repo: OWNER/NAME.
        is_public: Whether a new repository is public.
        may_exist: Whether an existing repository may be updated. Its other files are deleted.
    """

    repo: str
    is_public: bool = False
    may_exist: bool = False

    def check(self) -> None:
        """Check what can be checked before the export: the name, the token, and whether the repository exists.

        Raises:
            UserError: Nothing can be pushed there.
        """
        import huggingface_hub

        self._check_name()
        api = huggingface_hub.HfApi()
        with _explain_hub_errors(f"--push: {self.repo} cannot be pushed to"):
            user = api.whoami()
            exists = api.repo_exists(self.repo)
        role = user.get("auth", {}).get("accessToken", {}).get("role")
        if role == "read":
            raise UserError(f"--push: the token is read-only. Create one with write access at {TOKENS_PAGE}.")
        if exists and not self.may_exist:
            raise UserError(f"--push: {self.repo} already exists. Name another repository, or add --update.")

    def _check_name(self) -> None:
        """Raise `UserError` if the hub allows no such name."""
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # documented, but not re-exported

        if not is_hub_id(self.repo):
            raise UserError(f"--push: {self.repo!r} is not the name of a repository (expected OWNER/NAME).")
        try:
            validate_repo_id(self.repo)
        except HFValidationError as error:
            raise UserError(f"--push: {self.repo!r} is not the name of a repository ({summarize(error)}).") from None


def push_folder(folder: Path, target: PushTarget, message: str) -> str:
    """Upload a folder. The repository is created if it does not exist.

    Args:
        folder: An exported folder. It is kept even if the upload fails.
        target: The repository.
        message: First line of the commit.

    Returns:
        URL of the repository.

    Raises:
        UserError: The hub refused it, or cannot be reached.
    """
    import huggingface_hub

    api = huggingface_hub.HfApi()
    with _explain_hub_errors(f"{folder}: written, but not pushed to {target.repo}"):
        url = api.create_repo(target.repo, private=not target.is_public, exist_ok=target.may_exist)
        api.upload_folder(
            repo_id=target.repo, folder_path=folder, commit_message=message, delete_patterns="*" if target.may_exist else None
        )
    return str(url)


@contextlib.contextmanager
def _explain_hub_errors(subject: str) -> Iterator[None]:
    """Turn errors of huggingface_hub and its HTTP client into one line that starts with `subject`."""
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    try:
        yield
    except LocalTokenNotFoundError:
        raise UserError(f"{subject} (no token). Set HF_TOKEN, or run `hf auth login`.") from None
    except OfflineModeIsEnabled:
        raise UserError(f"{subject} (HF_HUB_OFFLINE is set). Remove it from the environment.") from None
    except HfHubHTTPError as error:
        status, reason = error.response.status_code, summarize(error.server_message or error)
        if status in REFUSED_STATUSES:
            raise UserError(
                f"{subject} (the hub refused the token: {reason}). Use a token with write access, from {TOKENS_PAGE}."
            ) from None
        raise UserError(f"{subject} (the hub answered {status}: {reason}). Try again with `hf upload`.") from None
    except Exception as error:  # errors of the HTTP client, which has changed between versions
        raise UserError(f"{subject} (the hub cannot be reached: {summarize(error)}). Check the connection.") from None
