"""An adapter on the Hugging Face Hub, with a card that tells what it was measured to do."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from deltamem.adapters.evaluation_card import HEADING, eval_results, evaluation_section, read_evaluation
from deltamem.adapters.files import load_adapter, save_adapter
from deltamem.errors import DeltaMemError

CARD = "README.md"
# Its HTTP client's error, which is another package's by huggingface-hub's version.
UNANSWERED: type[Exception] = HfHubHTTPError.__bases__[0]  # ty: ignore[invalid-assignment]


def publish(
    folder: Path,
    repo: str,
    evaluations: Sequence[str | Path] = (),
    base: str | None = None,
    private: bool | None = None,
    token: str | None = None,
) -> str:
    """Put an adapter on the Hub, in one commit; returns its address.

    What goes there is ``adapter_config.json``, ``adapter_model.safetensors`` and the folder's model card, never the
    backbone. The folder itself stays as it is.

    Args:
        folder: adapter of either format.
        repo: "user/name"; made if it isn't there.
        evaluations: results of ``python -m pipelines.evaluate``, which the card then shows with their controls.
        base: the backbone's Hub id, where the adapter names a local folder or nothing.
        private: whether a new repository is; None: as the user's or organisation's default.
        token: of the Hub; None: the one that `hf auth login` or HF_TOKEN has set.

    Raises:
        DeltaMemError: a part can't be read, the backbone has no Hub id, or the Hub refuses.
    """
    results = [read_evaluation(Path(path)) for path in evaluations]
    with TemporaryDirectory() as place:
        _write(folder, Path(place), base, results, repo)
        try:
            api = HfApi(token=token)
            repo = api.create_repo(repo, private=private, exist_ok=True).repo_id
            api.upload_folder(repo_id=repo, folder_path=place, commit_message="Adapter and its card")
            return f"{api.endpoint}/{repo}"
        except (OSError, HFValidationError, UNANSWERED) as error:  # what the Hub answers is an OSError
            raise DeltaMemError(f"{folder} can't be published as {repo}: {error}") from error


def _write(folder: Path, target: Path, base: str | None, results: list[dict], repo: str) -> None:
    config, tensors = load_adapter(folder)
    base = base or config.base_model_name_or_path
    if base is None or not _is_hub_id(base):
        raise DeltaMemError(
            f"{folder} was made for the backbone {base or '(unnamed)'}, which others don't have: name its Hub id (base)"
        )
    if (folder / CARD).is_file():
        (target / CARD).write_text((folder / CARD).read_text(encoding="utf-8"), encoding="utf-8")
    save_adapter(target, replace(config, base_model_name_or_path=base), tensors)
    card = ModelCard.load(target / CARD)
    card.data.base_model = base
    if results:
        before = re.sub(rf"\n{HEADING}\n.*?(?=\n## |\Z)", "", card.text, flags=re.DOTALL)
        card.text = f"{before.rstrip()}\n\n{evaluation_section(results)}"
        card.data.model_name, card.data.eval_results = repo.rpartition("/")[2], eval_results(results)
    card.save(target / CARD)


def _is_hub_id(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not Path(name).exists()
