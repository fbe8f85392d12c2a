"""Model, method, optimizer and data of a run, built in the one order that makes a resume exact."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedTokenizerBase

from tunefleet.data.batches import BatchSchedule
from tunefleet.data.prepare import PreparedData, prepare
from tunefleet.data.tokens import TokenSplit
from tunefleet.errors import RunFailed
from tunefleet.models import expert_share, load_tokenizer
from tunefleet.plan import Plan, batch_schedule
from tunefleet.training.checkpoint import RunState, load
from tunefleet.training.determinism import seed_everything
from tunefleet.training.engines.engine import Engine
from tunefleet.training.flops import peak_flops, token_flops
from tunefleet.training.layout import Layout, choose_layout
from tunefleet.training.loop import Feed, Gauge, evaluate, train
from tunefleet.training.loss import Objective, objective
from tunefleet.training.progress import Progress
from tunefleet.training.schedule import LearningRate, build_scheduler
from tunefleet.training.step import Step
from tunefleet.worker.mounting.mount import mount
from tunefleet.worker.mounting.mounted import Mounted
from tunefleet.worker.seat import Seat
from tunefleet.worker.start import Start
from tunefleet_strategies.contract import Precision


@dataclass(frozen=True)
class OpenedData:
    """The rows of a run and the tokenizer that made them."""

    tokenizer: PreTrainedTokenizerBase
    prepared: PreparedData
    train: TokenSplit

    @property
    def pad_token_id(self) -> int:
        """What fills up the rows of a model that must be padded; it is masked, so any token does."""
        own = self.tokenizer.pad_token_id
        return 0 if own is None else int(own)


def open_data(plan: Plan) -> OpenedData:
    """Memory-map the token rows; made again where this node has not got them.

    Raises:
        Refused: the data cannot be read here.
        RunFailed: they are not those that the plan counted.
    """
    recipe = plan.recipe
    tokenizer = load_tokenizer(recipe.model)
    settings = recipe.data.model_copy(update={"overwrite_cache": False})  # the driver has done so already
    prepared = prepare(settings, tokenizer, seed=recipe.training.order_seed, need_eval=recipe.evaluates)
    if prepared.train is None or plan.data is None or prepared.files["train.arrow"] != plan.data.train_sha256:
        raise RunFailed("The training rows on this node are not those of the plan: did a file change since the start?")
    return OpenedData(tokenizer, prepared, prepared.train)


@dataclass(frozen=True)
class Trainee:
    """Everything that trains, standing where its checkpoint left it."""

    plan: Plan
    state: RunState
    objective: Objective
    batches: BatchSchedule
    rate: LearningRate
    layout: Layout
    feed: Feed
    evaluation: Feed | None
    gauge: Gauge
    progress: Progress
    notices: tuple[str, ...]

    @property
    def engine(self) -> Engine:
        return self.state.engine

    @property
    def model(self) -> nn.Module:
        return self.state.model

    def steps(self, should_stop: Callable[[], bool]) -> Iterator[Step]:
        """The updates that are left. Collective."""
        return train(
            self.engine,
            self.objective,
            self.feed,
            self.batches,
            self.rate,
            first=self.progress.step,
            should_stop=should_stop,
            gauge=self.gauge,
        )

    def evaluate(self) -> float:
        """Loss over the held-out rows, nats per target token. Collective."""
        if self.evaluation is None:
            raise AssertionError("the plan evaluates and the data have no rows for it")
        return evaluate(self.engine, self.objective, self.evaluation)


def build(plan: Plan, seat: Seat, data: OpenedData, start: Start) -> Trainee:
    """Build a run on this rank and put the checkpoint of `start` into it. Collective.

    Raises:
        Refused, StrategyError: model, method or checkpoint do not go together.
    """
    recipe = plan.recipe
    mounted = mount(plan, seat, seat.together(start.initial))
    if start.shared is not None:
        start.shared.leave(mounted.state.initial)
    precision = mounted.precision
    engine, model, state = mounted.engine, mounted.engine.model, mounted.state
    layout = choose_layout(model, precision, plain_attention=recipe.model.flash_attn == "disabled")
    # After this line everything random is drawn from the run's own streams, one for each rank.
    seed_everything(recipe.training.seed, seat.rank)
    batches = batch_schedule(plan)
    rate = build_scheduler(engine.optimizer, recipe.training, batches.updates)
    progress, notices = Progress(), layout.notices
    if start.folder is not None:
        folder = start.folder
        loaded = seat.together(lambda: load(folder, state))
        progress, notices = loaded.progress, (*notices, *loaded.notices)
    pad_token_id = data.pad_token_id if layout.padded else None
    held_out = data.prepared.evaluation
    training = recipe.training
    return Trainee(
        plan=plan,
        state=state,
        objective=objective(
            model,
            precision,
            one_backward=not recipe.method.traits().accumulation,
            lockstep=engine.lockstep,
            forward=engine.forward,
        ),
        batches=batches,
        rate=rate,
        layout=layout,
        feed=Feed(data.train, training.per_device_train_batch_size, pad_token_id, training.dataloader_num_workers),
        evaluation=None if held_out is None else Feed(held_out, training.per_device_eval_batch_size, pad_token_id),
        gauge=_gauge(mounted, precision, seat),
        progress=progress,
        notices=notices,
    )


def _gauge(mounted: Mounted, precision: Precision, seat: Seat) -> Gauge:
    flops = token_flops(mounted.shape, expert_share=expert_share(mounted.engine.model))
    return Gauge(flops, peak_flops(precision.compute, seat.device.type))
