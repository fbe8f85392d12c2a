"""Gathering what a plan is made from: tokens, the model's shape, the cluster's shape. No weights are loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tunefleet.data.prepare import PreparedData, prepare
from tunefleet.data.tokens import TokenSplit
from tunefleet.errors import Refused
from tunefleet.models import load_tokenizer, meta_model, model_shape
from tunefleet.plan import Plan
from tunefleet.planning import make_plan, planned_precision
from tunefleet.recipe.sections import Recipe
from tunefleet.shapes import ClusterShape, DataShape, SplitShape
from tunefleet.training import deepspeed_config
from tunefleet.training.deepspeed_verdict import refuse_unreadable
from tunefleet_strategies.contract import AttachContext

Stages = Callable[[str, int, int], None]
"""Told how far a stage has come: its name, how much is done, of how much."""


def draft(
    recipe: Recipe, cluster: ClusterShape, root: Path, stages: Stages | None = None, with_data: bool = True
) -> Plan:
    """Make the plan of a recipe; tokenises the data if the cache lacks it and `with_data` is set.

    Raises:
        Refused: data, model or cluster do not allow the run.
        StrategyError: the method cannot do this on this model.
    """
    recipe, named = _with_deepspeed_read(recipe, root), recipe.training.deepspeed
    context = AttachContext(precision=planned_precision(recipe, cluster))
    model = recipe.method.attach(meta_model(recipe.model), context)
    shape = model_shape(model)
    # Whatever the cluster or the method refuses is refused before a long tokenisation.
    made = make_plan(recipe, shape, None, cluster, str(root))
    if made.deepspeed is not None and not (isinstance(named, str) and named in deepspeed_config.NAMED):
        refuse_unreadable(made.deepspeed)
    if with_data:
        prepared = tokenised(recipe, stages)
        made = make_plan(recipe, shape, data_shape(prepared), cluster, str(root), _data_notices(prepared))
    told = recipe.method.notices(model, made.batch.updates, recipe.training.seed)
    return made.model_copy(update={"notices": (*made.notices, *told)})


def _with_deepspeed_read(recipe: Recipe, root: Path) -> Recipe:
    """The recipe with the content of its DeepSpeed file in the path's place: no worker needs to have the file.

    Raises:
        Refused: there is no such file, or it holds no JSON.
    """
    written = recipe.training.deepspeed
    if not isinstance(written, str) or written in deepspeed_config.NAMED:
        return recipe
    training = recipe.training.model_copy(update={"deepspeed": deepspeed_config.read(written, root)})
    return recipe.model_copy(update={"training": training})


def tokenised(recipe: Recipe, stages: Stages | None = None) -> PreparedData:
    """The recipe's token splits, from the cache or made now."""
    return prepare(
        recipe.data,
        load_tokenizer(recipe.model),
        seed=recipe.training.order_seed,
        need_eval=recipe.evaluates,
        progress=stages,
    )


def data_shape(prepared: PreparedData) -> DataShape:
    """Sizes of what was tokenised.

    Raises:
        Refused: there is nothing to train on.
    """
    if prepared.train is None or prepared.train.target_tokens == 0:
        raise Refused("No token of the training data is learned: show its rows with `tunefleet data`, mend the data.")
    evaluation = _split_shape(prepared.evaluation) if prepared.evaluation else None
    return DataShape(
        train=_split_shape(prepared.train),
        evaluation=evaluation,
        train_sha256=prepared.files["train.arrow"],
        bad_rows=prepared.bad_rows.count,
    )


def _split_shape(split: TokenSplit) -> SplitShape:
    return SplitShape(rows=split.rows, tokens=split.tokens, target_tokens=split.target_tokens)


def _data_notices(prepared: PreparedData) -> list[str]:
    bad = prepared.bad_rows
    if not bad.count:
        return list(prepared.notices)
    shown = "; ".join(f"{row.source} row {row.row}: {row.reason}" for row in bad.first)
    more = "; ..." if bad.count > len(bad.first) else ""
    what = "row is" if bad.count == 1 else "rows are"
    return [*prepared.notices, f"{bad.count:,} {what} not used ({shown}{more})."]
