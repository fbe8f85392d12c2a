"""What a run will be, decided before anything starts.

`make_plan` is a pure function of the recipe, the model's shape, the data's shape and the cluster's shape. What cannot
run is refused here, in one sentence that names the keys that clash and the nearest recipe that would run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tunefleet.errors import Refused
from tunefleet.hardware import Hardware
from tunefleet.places import in_words, too_many_workers, unsharded_only, why_not_sharded
from tunefleet.plan import BatchPlan, CadencePlan, DataPlan, ModelPlan, PlacePlan, Plan, PrecisionPlan, WorkerPlan
from tunefleet.recipe.sections import Recipe
from tunefleet.shapes import SINGLE_WORKER, ClusterShape, DataShape
from tunefleet.training import deepspeed_config
from tunefleet.training.precision import resolve
from tunefleet_strategies.contract import Footprint, ModelShape, Precision, Sharding, Traits


def make_plan(
    recipe: Recipe,
    model: ModelShape,
    data: DataShape | None,
    cluster: ClusterShape,
    root: str,
    notices: Sequence[str] = (),
) -> Plan:
    """Decide a run.

    Args:
        data: None where the data has not been tokenised; then only what does not depend on it is decided.
        root: the absolute folder that the recipe's relative paths start from.
        notices: sentences gathered while the arguments were made.

    Raises:
        Refused: the recipe cannot run on this cluster.
    """
    traits = recipe.method.traits()
    workers = _worker_plan(recipe, traits, cluster)
    sharding = _sharding(recipe, traits)
    _refuse(recipe, traits, workers)
    _refuse_elastic(recipe, workers, sharding)
    precision, precision_notices = resolve(recipe.training, _hardware(recipe, workers, cluster))
    batch = _batch_plan(recipe, workers.count, data)
    return Plan(
        recipe=recipe,
        workers=workers,
        sharding=sharding,
        deepspeed=_deepspeed(recipe, traits, model, precision, batch, workers),
        precision=PrecisionPlan(
            compute=_dtype_name(precision.compute),
            trainable=_dtype_name(precision.trainable),
            frozen=_dtype_name(precision.frozen),
        ),
        batch=batch,
        cadence=_cadence_plan(recipe, batch),
        model=_model_plan(recipe, traits, model, precision, sharding, workers.count),
        data=_data_plan(data),
        place=PlacePlan(
            run_name=recipe.run_name,
            storage_path=recipe.ray.ray_storage_path,
            output_dir=recipe.run.output_dir,
            root=root,
        ),
        resumable=traits.resumable and not recipe.run.save_only_model,
        notices=(
            *recipe.notices,
            *notices,
            *precision_notices,
            *_resume_notices(recipe, traits),
            *_clipping_notices(recipe, traits),
            *_room_notices(recipe, workers, cluster),
            *_warmup_notices(batch),
            *_sharding_notices(sharding),
        ),
    )


def planned_workers(recipe: Recipe, cluster: ClusterShape) -> WorkerPlan:
    """The workers of a run whose model is not at hand: what the recipe, its method and the cluster decide alone.

    Raises:
        Refused: as `make_plan`.
    """
    traits = recipe.method.traits()
    workers = _worker_plan(recipe, traits, cluster)
    sharding = _sharding(recipe, traits)
    _refuse(recipe, traits, workers)
    _refuse_elastic(recipe, workers, sharding)
    return workers


def refuse_too_large(recipe: Recipe, cluster: ClusterShape) -> None:
    """See that the cluster can hold the workers.

    Raises:
        Refused: it cannot, however it grows.
    """
    _worker_plan(recipe, recipe.method.traits(), cluster)


def planned_precision(recipe: Recipe, cluster: ClusterShape) -> Precision:
    """The number formats of a run, which its method must know before there is a model's shape to plan with.

    Raises:
        Refused: as `make_plan`.
    """
    workers = _worker_plan(recipe, recipe.method.traits(), cluster)
    return resolve(recipe.training, _hardware(recipe, workers, cluster))[0]


def _hardware(recipe: Recipe, workers: WorkerPlan, cluster: ClusterShape) -> Hardware:
    """What trains, as far as it can be known before the workers start."""
    if workers.device == "cpu" or cluster.gpu is not None or not cluster.may_grow:
        return cluster.hardware(workers.device)
    training = recipe.training
    if training.bf16 is None and not training.pure_bf16 and not training.fp16:
        raise Refused(
            "No GPU of the cluster can be asked now whether it computes in bf16, which decides the number format: "
            "write bf16: true or bf16: false, or wait until one is up and free."
        )
    return Hardware("cuda", bf16=True)


def _dtype_name(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")


def _refuse(recipe: Recipe, traits: Traits, workers: WorkerPlan) -> None:
    """Refuse what the method's traits exclude, whatever the model is."""
    label, training = recipe.method.label(), recipe.training
    if not traits.accumulation and training.gradient_accumulation_steps > 1:
        raise Refused(
            f"{label} cannot accumulate gradients, but gradient_accumulation_steps is "
            f"{training.gradient_accumulation_steps}: set it to 1 and raise per_device_train_batch_size."
        )
    if not traits.clipping and training.max_grad_norm > 0 and "max_grad_norm" in recipe.written:
        raise Refused(
            f"{label} uses each gradient before the norm of all is known, but max_grad_norm is "
            f"{training.max_grad_norm:g}: write max_grad_norm: 0."
        )
    if not traits.decay and training.weight_decay > 0:
        raise Refused(
            f"{label} knows no weight decay, but weight_decay is {training.weight_decay:g}: write weight_decay: 0."
        )
    recipe.method.refuse_optimizer(training.optim)
    if training.optim == "adamw_8bit" and workers.device != "cuda":
        raise Refused(
            f"optim: {training.optim} keeps its state in 8 bits by kernels that need a GPU, but resources_per_worker "
            "gives none: write optim: adamw_torch, or ask for {GPU: 1}."
        )


def _sharding(recipe: Recipe, traits: Traits) -> Sharding | None:
    """The engine that the recipe asks for."""
    training, mend = recipe.training, "to train with plain data parallelism over ray_num_workers"
    if training.deepspeed is not None:
        if not traits.shardings:
            raise Refused(f"{unsharded_only(recipe.method)}, but deepspeed is written: leave the key out {mend}.")
        stage = deepspeed_config.sharding_of(_deepspeed_content(recipe))
        why = why_not_sharded(recipe.method, stage)
        if why is not None:
            raise Refused(f"{why}, but deepspeed asks for {in_words(stage)}: leave the key out {mend}.")
        return stage
    if training.sharding == "none":
        return None
    why = why_not_sharded(recipe.method, training.sharding)
    if why is not None:
        raise Refused(f"{why}, but sharding is {training.sharding}: write sharding: none {mend}.")
    if training.fp16:
        raise Refused(
            f"fp16 needs a loss scaler, which is not shared out, but sharding is {training.sharding}: write bf16: true "
            f"instead of fp16: true."
        )
    return training.sharding


def _refuse_elastic(recipe: Recipe, workers: WorkerPlan, sharding: Sharding | None) -> None:
    """Refuse a number of workers that changes where a checkpoint holds for one number, or where there is none."""
    if not workers.elastic:
        return
    asked = f"ray_num_workers: [{workers.least}, {workers.count}]"
    if sharding is not None and sharding.startswith("zero"):
        raise Refused(
            f"{asked} lets the number of workers change, and a checkpoint of DeepSpeed can only be loaded by as many "
            f"workers as wrote it: write ray_num_workers: {workers.count}, or train without deepspeed."
        )
    if recipe.run.save_only_model:
        raise Refused(
            f"{asked} goes on from checkpoints when the workers change, and save_only_model: true writes none to go on "
            f"from: write save_only_model: false, or ray_num_workers: {workers.count}."
        )


def _deepspeed_content(recipe: Recipe) -> dict[str, Any]:
    """What `deepspeed:` means. A path is read where the plan is drafted, so here it is a mapping or a name."""
    written = recipe.training.deepspeed
    assert written is not None
    if isinstance(written, str) and written not in deepspeed_config.NAMED:
        raise Refused(f"deepspeed: {written} has not been read: name a JSON file that lies on this machine.")
    return deepspeed_config.read(written, Path())


def _deepspeed(
    recipe: Recipe, traits: Traits, model: ModelShape, precision: Precision, batch: BatchPlan, workers: WorkerPlan
) -> dict[str, Any] | None:
    """DeepSpeed's configuration, filled in from what has been decided."""
    if recipe.training.deepspeed is None:
        return None
    numbers = deepspeed_config.Numbers(
        micro_batch=batch.micro_batch_samples,
        accumulation=batch.accumulation,
        workers=workers.count,
        max_grad_norm=recipe.training.max_grad_norm,
        compute=_dtype_name(precision.compute),
        # Whatever trains in turns has a master copy for as long as its turn, so only its passes may need converting.
        pure=recipe.training.pure_bf16 and not traits.in_turns,
        autocast=precision.autocast and traits.in_turns,
        hidden_size=model.hidden_size,
    )
    return deepspeed_config.fill(_deepspeed_content(recipe), numbers)


def _sharding_notices(sharding: Sharding | None) -> list[str]:
    if sharding != "zero0":
        return []
    return ["Stage 0 of ZeRO shares nothing out: the run is plain data parallelism, and DeepSpeed itself does not run."]


def _clipping_notices(recipe: Recipe, traits: Traits) -> list[str]:
    if traits.clipping or recipe.training.max_grad_norm == 0:
        return []
    return [
        f"{recipe.method.label()} uses each gradient before the norm of all is known: gradients are not clipped "
        f"(max_grad_norm: 0)."
    ]


def _fewer_workers(recipe: Recipe, traits: Traits, count: int) -> str:
    """The nearest recipe on as many workers as the method may have instead of `count`: the same global batch."""
    most = traits.max_workers or count
    key = "gradient_accumulation_steps" if traits.accumulation else "per_device_train_batch_size"
    training = recipe.training
    now = training.gradient_accumulation_steps if traits.accumulation else training.per_device_train_batch_size
    return f"ray_num_workers: {most} and {key}: {math.ceil(now * count / most)} to keep the global batch"


def _worker_plan(recipe: Recipe, traits: Traits, cluster: ClusterShape) -> WorkerPlan:
    written = recipe.ray.ray_num_workers
    least, count = (written, written) if isinstance(written, int) else written
    shown = str(count) if isinstance(written, int) else f"[{least}, {count}]"
    too_many = too_many_workers(recipe.method, count)
    if too_many is not None:
        raise Refused(f"{too_many}, but ray_num_workers is {shown}: write {_fewer_workers(recipe, traits, count)}.")
    request = dict(recipe.ray.resources_per_worker or _default_request(count, cluster))
    if not any(amount > 0 for amount in request.values()):
        raise Refused("resources_per_worker asks for nothing: write {CPU: 1} or {GPU: 1}, or leave it out.")
    strategy = recipe.ray.placement_strategy
    labels = _labels(traits, count, request, cluster)
    room = cluster.fits(request, strategy, labels)
    if room < least and cluster.bounded:
        mend = f"at most ray_num_workers: {room} does" if room else _smaller(request, cluster)
        raise Refused(f"{_does_not_fit(shown, request, strategy, cluster)}: {mend}.")
    gpus = request.get("GPU", 0.0)
    if 0 < gpus < 1 and count > 1 and strategy != "STRICT_SPREAD":
        raise Refused(
            f"resources_per_worker gives each of ray_num_workers: {count} a share of a GPU ({gpus:g}), but NCCL does "
            "not let two workers of a run have the same one: write {GPU: 1}, or ray_num_workers: 1."
        )
    return WorkerPlan(
        count=count,
        least=least,
        device="cuda" if request.get("GPU", 0) > 0 else "cpu",
        resources=request,
        placement_strategy=strategy,
        labels=labels,
        threads=max(1, int(request.get("CPU", 1))),
    )


def _labels(traits: Traits, count: int, request: Mapping[str, float], cluster: ClusterShape) -> dict[str, str]:
    """The nodes that the workers are kept to, where a cluster keeps some for methods that run on one worker.

    Else such a run would hold a part of a node that is large enough for several workers, which then has none for them.
    """
    kept = sum(node.fits(request) for node in cluster.nodes if node.is_as({SINGLE_WORKER: "true"}))
    if kept and traits.max_workers == 1:
        return {SINGLE_WORKER: "true"}
    if kept and count > 1 and cluster.fits(request, labels={SINGLE_WORKER: "!true"}):
        return {SINGLE_WORKER: "!true"}
    return {}


def _does_not_fit(count: int | str, request: Mapping[str, float], strategy: str, cluster: ClusterShape) -> str:
    wanted = ", ".join(f"{amount:g} {name}" for name, amount in request.items())
    laid_out = f" and placement_strategy: {strategy}" if strategy.startswith("STRICT") else ""
    amounts = {name: cluster.amount(name) for name in dict.fromkeys(("CPU", "GPU", *request))}
    there = ", ".join(f"{amount:g} {name}" for name, amount in amounts.items() if amount < math.inf)
    types = "; its node types are " + ", ".join(one.in_words() for one in cluster.node_types)
    there = f"{there}{types}" if cluster.node_types else there
    return f"ray_num_workers: {count} with {wanted} for each worker{laid_out} does not fit on the cluster ({there})"


def _smaller(request: Mapping[str, float], cluster: ClusterShape) -> str:
    """The mend for a worker that no node holds: a resource of a name that none of them has is often a misspelt one."""
    unknown = [name for name, amount in request.items() if amount > 0 and cluster.amount(name) == 0]
    if unknown:
        return f"no node offers {' or '.join(unknown)}, so correct or remove it in resources_per_worker"
    return "make resources_per_worker smaller"


def _room_notices(recipe: Recipe, workers: WorkerPlan, cluster: ClusterShape) -> list[str]:
    if cluster.fits(workers.resources, workers.placement_strategy, workers.labels) >= workers.least:
        return []
    sentence = _does_not_fit(workers.least, workers.resources, workers.placement_strategy, cluster)
    return [
        f"{sentence} as it is now: the run waits until nodes have joined, for at most ray_start_timeout: "
        f"{recipe.ray.ray_start_timeout} s."
    ]


def _default_request(count: int, cluster: ClusterShape) -> dict[str, float]:
    """One GPU for each worker if there are any, else the CPUs divided evenly (whole ones, on whole machines)."""
    if cluster.gpus >= 1:
        return {"GPU": 1.0, "CPU": 1.0}
    most = int(max((node.cpus for node in cluster.nodes), default=1))
    fitting = [cpus for cpus in range(most, 0, -1) if cluster.fits({"CPU": cpus}) >= count]
    return {"CPU": float(fitting[0] if fitting else 1)}


def _batch_plan(recipe: Recipe, workers: int, data: DataShape | None) -> BatchPlan:
    training = recipe.training
    micro, accumulation = training.per_device_train_batch_size, training.gradient_accumulation_steps
    global_batch = micro * accumulation * workers
    updates_per_epoch = math.ceil(data.train.rows / global_batch) if data else None
    if training.max_steps > 0:
        updates: int | None = training.max_steps
    elif updates_per_epoch is not None:
        updates = max(1, math.ceil(training.num_train_epochs * updates_per_epoch))
    else:
        updates = None
    warmup = None
    if training.warmup_steps > 0:
        warmup = training.warmup_steps
    elif updates is not None:
        warmup = math.ceil(training.warmup_ratio * updates)
    return BatchPlan(
        micro_batch_samples=micro,
        accumulation=accumulation,
        global_batch_samples=global_batch,
        updates=updates,
        updates_per_epoch=updates_per_epoch,
        warmup_updates=warmup,
    )


def _cadence_plan(recipe: Recipe, batch: BatchPlan) -> CadencePlan:
    run = recipe.run
    per_epoch = batch.updates_per_epoch or 1
    saving = {"no": None, "steps": run.save_steps, "epoch": per_epoch}[run.save_strategy]
    evaluation = {"no": None, "steps": run.evaluation_steps, "epoch": per_epoch}[run.eval_strategy]
    return CadencePlan(
        logging=run.logging_steps,
        saving=saving,
        evaluation=evaluation,
        evaluates_at_start=run.eval_on_start,
        evaluates_at_end=evaluation is not None or recipe.training.do_eval,
        preemption_notices=recipe.ray.preemption_poll_steps,
    )


def _under_zero(
    whole: Footprint, model: ModelShape, precision: Precision, traits: Traits, stage: int, workers: int
) -> Footprint:
    """What each worker holds under a stage of ZeRO, from what one worker would hold without."""
    entries = whole.gradients // precision.trainable.itemsize  # that train at a time
    pure = precision.trainable.itemsize < 4
    has_masters = pure and traits.in_turns  # in the footprint already
    mixed = precision.autocast and not traits.in_turns  # 16-bit weights, fp32 masters
    weights = model.total * precision.compute.itemsize if mixed else whole.weights
    # DeepSpeed keeps masters beside fp32 weights too, and sums gradients in their format.
    format_bytes = 2 if pure and not traits.in_turns else 4
    state = whole.optimizer_state + (0 if has_masters else entries * format_bytes)
    return Footprint(
        weights=math.ceil(weights / (workers if stage == 3 else 1)),
        gradients=math.ceil(entries * format_bytes / (workers if stage >= 2 else 1)),
        optimizer_state=math.ceil(state / workers),
    )


def _model_plan(
    recipe: Recipe, traits: Traits, model: ModelShape, precision: Precision, sharding: Sharding | None, workers: int
) -> ModelPlan:
    """Figures of one worker."""
    footprint = recipe.method.footprint(model, precision)
    parts = workers if sharding == "fsdp2" else 1
    if sharding in ("zero1", "zero2", "zero3"):
        footprint = _under_zero(footprint, model, precision, traits, int(sharding[-1]), workers)
    return ModelPlan(
        architecture=model.architecture,
        parameters=model.total,
        trainable_parameters=model.trainable,
        weight_bytes=math.ceil(footprint.weights / parts),
        gradient_bytes=math.ceil(footprint.gradients / parts),
        optimizer_bytes=0 if recipe.training.optim == "sgd" else math.ceil(footprint.optimizer_state / parts),
    )


def _data_plan(data: DataShape | None) -> DataPlan | None:
    if data is None:
        return None
    return DataPlan(
        train_rows=data.train.rows,
        train_tokens=data.train.tokens,
        train_target_tokens=data.train.target_tokens,
        evaluation_rows=data.evaluation.rows if data.evaluation else None,
        train_sha256=data.train_sha256,
        bad_rows=data.bad_rows,
    )


def _resume_notices(recipe: Recipe, traits: Traits) -> list[str]:
    if not traits.resumable:
        return [f"The optimizer state of {recipe.method.label()} cannot be saved, so this run cannot be resumed."]
    if recipe.run.save_only_model:
        return ["save_only_model: true leaves the optimizer out of every checkpoint, so this run cannot be resumed."]
    return []


def _warmup_notices(batch: BatchPlan) -> list[str]:
    if batch.updates is None or batch.warmup_updates is None or batch.warmup_updates < batch.updates:
        return []
    return [
        f"The learning rate rises for {batch.warmup_updates} updates and the run has {batch.updates}: it never comes "
        f"down; fewer warmup_steps would let it."
    ]
