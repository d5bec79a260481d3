"""Boards that other packages keep: Weights & Biases, trackio (whose interface is that of wandb), MLflow.

They show what TensorBoard shows, by the same tags. All calls are made by one thread of each tracker: a server that is
slow holds no step up. A call that fails costs its records, and the training goes on.

A resumed run goes on with the same run there. None of them takes back what it has: a step that is done again keeps the
numbers that it had at first, which an exact resume repeats, and is not sent twice. What has been sent is noted in a
small file of the run directory.
"""

from __future__ import annotations

import html
import os
import queue
import re
import secrets
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from PIL import Image
from pydantic import Field

from dist_moe.config.files import read_json, write_json
from dist_moe.engine.monitor.board import Board
from dist_moe.engine.monitor.pictures import Panel, draw
from dist_moe.engine.monitor.tensorboard import history_in
from dist_moe.engine.monitor.trackers import TRACKERS, Say, Tracker, TrackerSettings
from dist_moe.errors import UserError

MOST_WAITING = 5_000
"""Rows that may wait for a service; beyond it the newest are given up."""
PATIENCE_S = 60.0
"""Seconds that the end of a run waits for a service to take in what is left."""

Hyperparameters = Mapping[str, bool | float | str]


@dataclass
class Row:
    """All that is shown of one step. ``kinds``: what of it, see :attr:`Progress.sent`. ``seconds``: since the epoch."""

    step: int
    kinds: set[str] = field(default_factory=set)
    numbers: dict[str, float] = field(default_factory=dict)
    images: dict[str, Image.Image] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    hyperparameters: Hyperparameters = field(default_factory=dict)
    seconds: float = field(default_factory=time.time)


class Service(ABC):
    """A run of somebody else's board. All methods are called by one thread; they raise whatever the package raises."""

    title: str

    @abstractmethod
    def open(self, run_id: str | None, name: str, last_step: int) -> tuple[str, str | None]:
        """Begin a run, or go on with the one ``run_id``; return its id, and where it can be looked at, if anywhere.

        ``last_step``: the last of which anything was sent before; -1: nothing was.
        """

    @abstractmethod
    def send(self, rows: Sequence[Row]) -> None:
        """Show rows, which come in the order of their steps but for texts."""

    @abstractmethod
    def close(self) -> None:
        """End the run, when all is sent."""


class ServiceTracker(Board):
    """Gives a board's curves, pictures and texts to ``service``, in a thread of its own.

    ``note``: the file with the run's id there and the last step sent of each kind. ``lost``: rows that the service did
    not take; final after :meth:`close`.
    """

    def __init__(self, service: Service, note: Path, first_step: int, say: Say) -> None:
        super().__init__(first_step, history_in(note.parent, first_step))
        self.lost = 0
        self._service, self._note, self._say = service, note, say
        content = _content_of(note, say)
        self._id: str | None = content.get("id")
        self._sent: dict[str, int] = content.get("sent", {})
        self._before = dict(self._sent)
        self._rows: dict[int, Row] = {}
        self._told: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._failed: set[str] = set()
        self._outbox: queue.Queue[Row | None] = queue.Queue()
        self._thread = threading.Thread(target=self._work, name=f"{service.title} of {note.parent}", daemon=True)
        self._thread.start()

    def curves(self, kind: str, values: Mapping[str, float], step: int) -> None:
        """Take a point of each curve."""
        if self._is_new(kind, step):
            self._row(kind, step).numbers.update(values)

    def picture(self, name: str, panels: Sequence[Panel], step: int) -> None:
        """Take a picture of ``panels``, one below the other."""
        if self._is_new(name, step):
            self._row(name, step).images[name] = draw(panels)

    def text(self, name: str, text: str, step: int) -> None:
        """Take a text, in Markdown; several of one name and step become one."""
        if self._is_new(name, step):
            texts = self._row(name, step).texts
            texts[name] = f"{texts[name]}\n\n{text}" if name in texts else text

    def hyperparameters(self, values: Hyperparameters) -> None:
        """Take what the run is compared by with others."""
        self._row("hyperparameters", self._step).hyperparameters = values

    def follow(self, root: Path) -> None:
        """Keep the note where the run directory is now."""
        self._note = root / self._note.name

    def flush(self) -> None:
        """Hand over the rows up to the last step; those of later evaluations wait for the steps before them."""
        super().flush()
        for step in sorted(step for step in self._rows if step <= self._step):
            self._hand_over(self._rows.pop(step))
        self._speak()

    def close(self) -> None:
        """Hand over what is left and wait until it is taken, for a minute at most."""
        super().close()
        for step in sorted(self._rows):
            self._hand_over(self._rows.pop(step))
        self._outbox.put(None)
        self._thread.join(PATIENCE_S)
        if self._thread.is_alive():
            self.lost += max(self._outbox.qsize() - 1, 0)
            self._told.put(f"warning: {self._service.title} has not taken everything in within {PATIENCE_S:g} s")
        if self.lost:
            self._told.put(f"warning: {self.lost} record(s) for {self._service.title} are lost")
        self._speak()

    def _speak(self) -> None:
        while not self._told.empty():
            self._say(self._told.get())

    def _is_new(self, kind: str, step: int) -> bool:
        """Return whether an earlier attempt has not sent this already."""
        return step > self._before.get(kind, -1)

    def _row(self, kind: str, step: int) -> Row:
        row = self._rows.setdefault(step, Row(step))
        row.kinds.add(kind)
        return row

    def _hand_over(self, row: Row) -> None:
        if self._outbox.qsize() < MOST_WAITING:
            self._outbox.put(row)
        else:
            self.lost += 1

    def _work(self) -> None:
        """Send what is handed over until the end of the run: all calls of the package are here."""
        is_open = self._is_done(self._open)
        is_last = False
        while not is_last:
            rows = list(self._handed_over())
            is_last = rows[-1] is None
            rows = [row for row in rows if row is not None]
            if not (is_open and self._is_done(self._send, rows)):
                self.lost += len(rows)
        if is_open:
            self._is_done(self._service.close)

    def _handed_over(self) -> Iterator[Row | None]:
        """Yield what waits, at least one; None, at the end, is the last."""
        yield self._outbox.get()
        while not self._outbox.empty():
            yield self._outbox.get()

    def _is_done(self, call: Callable[..., None], *arguments: Any) -> bool:
        """Return whether a call ended well; say why not, once for each kind of error."""
        try:
            call(*arguments)
        except Exception as error:  # a package and its server may raise anything, and none of it is worth a training
            kind = type(error).__name__
            if kind not in self._failed:
                self._failed.add(kind)
                text = " ".join(str(error).split())[:300]
                self._told.put(f"warning: {self._service.title} fails: {kind}: {text}; the training goes on without")
            return False
        return True

    def _open(self) -> None:
        root = self._note.parent
        name = f"{root.parents[1].name}/{root.name}" if root.parent.name == "stages" else root.name
        self._id, address = self._service.open(self._id, name, max(self._sent.values(), default=-1))
        self._is_done(self._remember)
        if address:
            self._told.put(f"{self._service.title}: {address}")

    def _send(self, rows: Sequence[Row]) -> None:
        if not rows:
            return
        self._service.send(rows)
        for row in rows:
            self._sent |= {kind: max(row.step, self._sent.get(kind, 0)) for kind in row.kinds}
        self._is_done(self._remember)

    def _remember(self) -> None:
        write_json(self._note, {"id": self._id, "sent": self._sent})


def _content_of(note: Path, say: Say) -> dict[str, Any]:
    """Return what an earlier attempt has noted; nothing, if it cannot be read: then another run begins there."""
    try:
        return dict(read_json(note)) if note.exists() else {}
    except (UserError, TypeError, ValueError) as error:
        say(f"warning: {error}; a new run begins there")
        return {}


class WandbService(Service):
    """A run of Weights & Biases, whose files lie in ``root``, or of trackio."""

    def __init__(self, settings: WandbSettings, root: Path) -> None:
        self.title = {"wandb": "Weights & Biases", "trackio": "trackio"}[settings.library]
        self._settings, self._root = settings, root
        self._last = 0

    def open(self, run_id: str | None, name: str, last_step: int) -> tuple[str, str | None]:
        """Begin or go on with a run."""
        settings = self._settings
        run_id = run_id or secrets.token_hex(4)
        self._library: Any = import_module(settings.library)
        if settings.library == "trackio":  # it knows runs by their names, and prints to standard output
            with redirect_stdout(sys.stderr):
                self._run: Any = self._library.init(
                    settings.project, name=f"{name} {run_id}", resume="allow", space_id=settings.space, embed=False
                )
            return run_id, None
        if settings.mode == "online" and not self._library.login(prompt=False):
            raise RuntimeError("there are no credentials; log in by 'wandb login', or set mode: offline")
        self._run = self._library.init(
            project=settings.project,
            entity=settings.entity,
            id=run_id,
            name=name,
            dir=str(self._root.absolute()),
            mode=settings.mode,
            resume="allow" if settings.mode == "online" else None,
            reinit="create_new",
            settings=self._library.Settings(silent=True, console="off"),
        )
        self._last = max(self._run.step, last_step + 1)
        return run_id, self._run.url if settings.mode == "online" else None

    def send(self, rows: Sequence[Row]) -> None:
        """Log rows. W&B takes nothing for a step that is over: what comes late stands at the next that it takes."""
        for row in rows:
            values: dict[str, Any] = dict(row.numbers)
            values |= {name: self._library.Image(image) for name, image in row.images.items()}
            values |= {name: self._text(text) for name, text in row.texts.items()}
            if row.hyperparameters and self._settings.library == "wandb":
                self._run.config.update(dict(row.hyperparameters), allow_val_change=True)
            elif row.hyperparameters:  # trackio takes its config at the start alone
                lines = [f"| {name} | {value} |" for name, value in row.hyperparameters.items()]
                values["hyperparameters"] = self._text("\n".join(["| field | value |", "| --- | --- |", *lines]))
            self._last = max(row.step, self._last)
            if values:
                self._run.log(values, step=self._last)

    def _text(self, text: str) -> Any:
        if self._settings.library == "trackio":
            return self._library.Markdown(text)
        return self._library.Html(f"<pre>{html.escape(text)}</pre>")

    def close(self) -> None:
        """End the run."""
        with redirect_stdout(sys.stderr):
            self._run.finish()


class MLflowService(Service):
    """A run of MLflow's tracking."""

    title = "MLflow"

    def __init__(self, settings: MLflowSettings) -> None:
        self._settings = settings

    def open(self, run_id: str | None, name: str, last_step: int) -> tuple[str, str | None]:
        """Begin or go on with a run."""
        from mlflow import MlflowClient

        self._client = client = MlflowClient(tracking_uri=self._settings.uri)
        if run_id is None:
            experiment = client.get_experiment_by_name(self._settings.experiment)
            number = experiment.experiment_id if experiment else client.create_experiment(self._settings.experiment)
            run = client.create_run(number, run_name=name)
        else:
            client.update_run(run_id, status="RUNNING")
            run = client.get_run(run_id)
        self._id, self._fields = run.info.run_id, set(run.data.params)
        return self._id, None

    def send(self, rows: Sequence[Row]) -> None:
        """Log rows: numbers as metrics, pictures and texts as artifacts, fields of the configuration as parameters."""
        from mlflow.entities import Metric, Param

        points = [(row, tag, value) for row in rows for tag, value in row.numbers.items()]
        numbers = [Metric(_key(tag), value, int(row.seconds * 1000), row.step) for row, tag, value in points]
        for first in range(0, len(numbers), 1000):  # MLflow takes no more at once
            self._client.log_batch(self._id, metrics=numbers[first : first + 1000], synchronous=True)
        for row in rows:
            # MLflow refuses other values of a field that it knows: those of the first attempt stay.
            fields = {_key(name): str(value) for name, value in row.hyperparameters.items()}
            new = [Param(name, value) for name, value in fields.items() if name not in self._fields]
            for first in range(0, len(new), 100):
                self._client.log_batch(self._id, params=new[first : first + 100], synchronous=True)
            self._fields |= set(fields)
            for name, image in row.images.items():
                self._client.log_image(self._id, image, key=_key(name), step=row.step, synchronous=True)
            for name, text in row.texts.items():
                self._client.log_text(self._id, text, f"{_key(name)}/step-{row.step:08d}.md")

    def close(self) -> None:
        """End the run."""
        self._client.set_terminated(self._id)


def _key(name: str) -> str:
    """Return a name of the signs that MLflow allows in one."""
    return re.sub(r"[^\w\-. :/]", "_", name)


def _check_installed(tracker: str, module: str) -> None:
    """Raise UserError where a package is missing; the extra that brings it is called as its module is."""
    if find_spec(module) is None:
        raise UserError(
            f"trackers: {tracker} needs the package {module}: install the extra, "
            f"pip install 'comet-dist-moe[{module}]', or leave this tracker out"
        )


@TRACKERS.register
class WandbSettings(TrackerSettings):
    """Weights & Biases, or trackio. Nothing leaves the machine but with ``mode: online``."""

    name: Literal["wandb"] = Field("wandb", description="which tracker this is")
    library: Literal["wandb", "trackio"] = Field("wandb", description="the package that takes the numbers")
    project: str = Field("dist_moe", min_length=1, max_length=128, description="the project that the run belongs to")
    mode: Literal["online", "offline"] = Field(
        "offline", description="online: send at once; offline: keep on this machine, for 'wandb sync' or 'trackio show'"
    )
    entity: str | None = Field(None, description="wandb: the team or user; null: the one that is logged in")
    space: str | None = Field(None, description="trackio, online: the Hugging Face Space, USER/NAME")

    def check(self) -> None:
        """Raise UserError where the package is missing, and where it would send what it should not, or cannot."""
        _check_installed(self.name, self.library)
        is_trackio = self.library == "trackio"
        if (self.space is not None) != (is_trackio and self.mode == "online"):
            raise UserError(
                f"trackers: wandb: space={self.space}: one is for trackio with mode: online, which needs it"
            )
        if is_trackio and self.entity is not None:
            raise UserError(f"trackers: wandb: entity={self.entity}: trackio has none; leave it out")
        for name in ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL") if is_trackio and self.mode == "offline" else ():
            if os.environ.get(name):
                raise UserError(f"trackers: wandb: mode=offline, and {name} tells trackio to send; unset it")

    def build(self, root: Path, first_step: int, say: Say) -> Tracker:
        """Return the tracker that logs there."""
        return ServiceTracker(WandbService(self, root), root / f"{self.library}.json", first_step, say)


@TRACKERS.register
class MLflowSettings(TrackerSettings):
    """MLflow's tracking: a server, a data base or a directory."""

    name: Literal["mlflow"] = Field("mlflow", description="which tracker this is")
    uri: str | None = Field(
        None, description="where runs are kept; null: MLFLOW_TRACKING_URI, else mlflow.db in the working directory"
    )
    experiment: str = Field("dist_moe", min_length=1, max_length=128, description="the experiment of the run")

    def check(self) -> None:
        """Raise UserError where the package is missing."""
        _check_installed(self.name, "mlflow")

    def build(self, root: Path, first_step: int, say: Say) -> Tracker:
        """Return the tracker that logs there."""
        return ServiceTracker(MLflowService(self), root / "mlflow.json", first_step, say)
