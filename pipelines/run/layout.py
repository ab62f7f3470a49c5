"""Where everything of a run lies: one place that knows the folder names."""

from __future__ import annotations

from pathlib import Path

from pipelines.config import Config


class Layout:
    """Paths of one configuration's results, ``results_dir/<config name>/…`` (relative where results_dir is).

    The frozen backbone's evaluations lie in the same tree as the cells', under strategy ``frozen``, seed 0.
    """

    def __init__(self, config: Config) -> None:
        self.results = Path(config.results_dir)
        self.root = self.results / config.name
        self._tracking_uri = config.registry.tracking_uri

    @property
    def resolved_config(self) -> Path:
        return self.root / "config.resolved.json"

    def data(self, backbone: str, split: str) -> Path:
        """Folder of the episodes of a split ("train" or "eval"), tokenised for that backbone."""
        return self.root / "data" / backbone / split

    def data_manifest(self, backbone: str, split: str) -> Path:
        return self.data(backbone, split) / "manifest.json"

    def replies(self, backbone: str, source: str) -> Path:
        """Folder of a backbone's own replies to what a source asks it, as chats."""
        return self.root / "replies" / backbone / source

    def replies_record(self, backbone: str, source: str) -> Path:
        return self.replies(backbone, source) / "replies.json"

    def backbone(self, backbone: str) -> Path:
        return self.root / "backbones" / backbone

    def backbone_record(self, backbone: str) -> Path:
        return self.backbone(backbone) / "backbone.json"

    def adapter(self, backbone: str, strategy: str, seed: int | str) -> Path:
        return self.root / "adapters" / self._cell(backbone, strategy, seed)

    def adapter_weights(self, backbone: str, strategy: str, seed: int | str) -> Path:
        return self.adapter(backbone, strategy, seed) / "adapter_model.safetensors"

    def training_record(self, backbone: str, strategy: str, seed: int | str) -> Path:
        return self.adapter(backbone, strategy, seed) / "training.json"

    def curve(self, backbone: str, strategy: str, seed: int | str) -> Path:
        return self.adapter(backbone, strategy, seed) / "curve.csv"

    def trace(self, backbone: str, strategy: str, seed: int | str) -> Path:
        """The profiler's trace of a training."""
        return self.root / "profiles" / self._cell(backbone, strategy, seed) / "trace.json"

    def tracker(self, backbone: str, strategy: str, seed: int | str) -> Path:
        """Folder of a tracker's own files on a training."""
        return self.root / "tracking" / self._cell(backbone, strategy, seed)

    def train_state(self, backbone: str, strategy: str, seed: int | str) -> Path:
        """Folder of checkpoints; no rule declares it as output, so that an interrupted run finds it again."""
        return self.root / "train_state" / self._cell(backbone, strategy, seed)

    def evaluation(self, backbone: str, strategy: str, seed: int | str, benchmark: str) -> Path:
        return self.root / "evals" / self._cell(backbone, strategy, seed) / f"{benchmark}.json"

    def records(self, backbone: str, strategy: str, seed: int | str, benchmark: str) -> Path:
        return self.root / "evals" / self._cell(backbone, strategy, seed) / f"{benchmark}.records.parquet"

    def registration(self, backbone: str, strategy: str, seed: int | str) -> Path:
        return self.root / "register" / backbone / strategy / f"seed{seed}.json"

    def champion(self, backbone: str) -> Path:
        return self.root / "register" / backbone / "champion.json"

    @property
    def report(self) -> Path:
        return self.root / "report"

    @property
    def report_page(self) -> Path:
        return self.report / "index.html"

    def log(self, stage: str, *cell: str) -> Path:
        """Log file of one job of a stage, such as ``logs/train/<backbone>/<strategy>/seed42.log``."""
        return self.root.joinpath("logs", stage, *cell[:-1], f"{cell[-1]}.log" if cell else f"{stage}.log")

    @property
    def store(self) -> str:
        """MLflow tracking URI; where the configuration names none, one store for all configurations."""
        return self._tracking_uri or f"sqlite:///{self.results.resolve() / 'mlflow.db'}"

    @staticmethod
    def _cell(backbone: str, strategy: str, seed: int | str) -> Path:
        return Path(backbone) / strategy / f"seed{seed}"
