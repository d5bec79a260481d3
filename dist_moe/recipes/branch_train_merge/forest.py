"""A forest on disk: bare models, one file each, and a manifest that says what they are.

    RUN/forest/forest.json          the manifest, replaced in one piece
    RUN/forest/0003-news.safetensors    the weights of one expert, as 'dist-moe export' writes them
    RUN/forest/clusters.npz         what tells the domains of a text by its words, where they were discovered

A file never changes: an expert that is replaced gets another file. So what happens to one expert cannot touch another.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from dist_moe.config.files import read_json, write_json
from dist_moe.config.settings import Settings
from dist_moe.data.text.clusters import Clusterer
from dist_moe.engine.checkpoint import ModelWeights, read_model, write_model
from dist_moe.engine.monitor.run_directory import RunDirectory
from dist_moe.errors import UserError

FOLDER, MANIFEST, CLUSTERS = "forest", "forest.json", "clusters.npz"
EXPERT = "expert"


class Member(Settings):
    """A model of the forest.

    ``role``: ``expert``; ``seed`` or ``twin``, models of the same kind to compare with; or what a way of merging made.
    ``digest``: of the file. ``tokens``: that this model alone has seen, without those of what it began from.
    ``begun_from``: where its first weights came from.
    """

    name: str
    role: str = EXPERT
    file: str
    digest: str
    tokens: int = 0
    begun_from: str = ""


class Manifest(Settings):
    """The content of the manifest. ``planted``: files written so far, those that are gone included."""

    format: Literal["dist_moe forest 1"] = "dist_moe forest 1"
    planted: int = 0
    members: tuple[Member, ...] = ()


class Forest:
    """The models of a run, by name; read anew from its manifest by each instance."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self.root = run / FOLDER
        self._manifest = _read(self.root / MANIFEST)

    @classmethod
    def exists(cls, run: Path) -> bool:
        """Return whether a run has a forest by now."""
        return (run / FOLDER / MANIFEST).is_file()

    @classmethod
    def found(cls, run: Path) -> Forest:
        """Return the forest of a run. Raises UserError if it has none, or not yet."""
        RunDirectory(run).check_exists()
        if not cls.exists(run):
            raise UserError(
                f"{run} has no forest: it is no run of recipe.name=branch_train_merge, or its branches have not been "
                f"trained yet; go on with it by 'dist-moe train --resume {run}'"
            )
        return cls(run)

    @property
    def members(self) -> dict[str, Member]:
        """All models by name: the experts in the order in which they were added, and what is beside them."""
        return {member.name: member for member in self._manifest.members}

    @property
    def experts(self) -> tuple[str, ...]:
        """The names of the experts, in order."""
        return tuple(name for name, member in self.members.items() if member.role == EXPERT)

    @property
    def planted(self) -> int:
        """Files written so far, which numbers the next one."""
        return self._manifest.planted

    def path(self, name: str) -> Path:
        """Return the file of a model. Raises UserError for a name that the forest does not have."""
        if name not in self.members:
            raise UserError(f"{self.run} has no expert {name}; it has {', '.join(self.members)}")
        return self.root / self.members[name].file

    def weights(self, name: str) -> ModelWeights:
        """Open the weights of a model. Raises UserError if its file is gone, damaged or another."""
        path, member = self.path(name), self.members[name]
        if not path.is_file():
            raise UserError(f"{path} is gone, the weights of {name}; put it back, or 'dist-moe forest drop' {name}")
        weights = read_model(path)
        if weights.digest != member.digest:
            raise UserError(f"{path} is not the file that was written for {name}; put it back, or replace {name}")
        return weights

    def plant(self, name: str, weights: ModelWeights, configuration: dict[str, Any], **fields: Any) -> Member:
        """Write a model's file and name it in the manifest, in the place of one of that name. For one process alone.

        ``fields``: of :class:`Member`. Raises UserError if it cannot be written.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        number = self._manifest.planted
        file = f"{number:04d}-{name}.safetensors"
        (self.root / file).unlink(missing_ok=True)  # of an attempt that died before the manifest named it
        written = write_model(weights, self.root / file, configuration)
        member = Member(name=name, file=file, digest=written.digest, **fields)
        before = self.members.get(name)
        self._write({**self.members, name: member}, number + 1)
        if before is not None:
            (self.root / before.file).unlink(missing_ok=True)
        return member

    def plant_clusterer(self, clusterer: Clusterer) -> None:
        """Write what tells discovered domains. For one process alone. Raises UserError if it cannot be written."""
        path = self.root / CLUSTERS
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            clusterer.save(path)
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error}") from error

    def clusterer(self) -> Clusterer:
        """Return what tells discovered domains. Raises UserError if there is none."""
        path = self.root / CLUSTERS
        if not path.is_file():
            raise UserError(
                f"{path} is not there, which tells experts by words; it belongs to a run of data.clusters, whose "
                "domains are discovered"
            )
        return Clusterer.load(path)

    def drop(self, name: str) -> None:
        """Take a model out of the manifest, then remove its file. For one process alone. Raises UserError."""
        path = self.path(name)
        self._write({other: member for other, member in self.members.items() if other != name}, self.planted)
        path.unlink(missing_ok=True)

    def _write(self, members: dict[str, Member], planted: int) -> None:
        manifest = Manifest(planted=planted, members=tuple(members.values()))
        try:
            write_json(self.root / MANIFEST, manifest.model_dump(mode="json"))
        except OSError as error:
            raise UserError(f"{self.root / MANIFEST} cannot be written: {error}") from error
        self._manifest = manifest


def _read(path: Path) -> Manifest:
    if not path.is_file():
        return Manifest()
    try:
        return Manifest.model_validate(read_json(path))
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(map(str, fault["loc"]))
        raise UserError(
            f"{path} is no manifest of a forest: {where}: {fault['msg']}; put back what was there"
        ) from error
