"""What a way to score units is: one small class, which sees groups and everything given."""

import abc
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import ArrayLike

from jaxcompress import tree
from jaxcompress.errors import ArgumentError, ArgumentTypeError
from jaxcompress.structured._groups import Group, Member


@dataclass(frozen=True, kw_only=True, eq=False)
class Given:
    """What `importance` was given: what a `Method` sees.

    Attributes:
        groups: The groups to score.
        params: The params.
        leaves: `{path: array}` of params.
        learned: `{group name: members}`: those whose leaves learn; running statistics do not.
        fn: `fn(params, *inputs) -> outputs`, or `None`.
        batches: Batches of its inputs (of those of `loss`, for methods that differentiate it).
        loss: `loss(params, *inputs) -> per-example losses, or their mean`, or `None`.
    """

    groups: Mapping[str, Group]
    params: tree.Params
    leaves: Mapping[str, Any]
    learned: Mapping[str, tuple[Member, ...]]
    fn: Callable[..., Any] | None = None
    batches: Iterable[Any] | None = None
    loss: Callable[..., Any] | None = None

    def weights(self, group: Group) -> tuple[Member, ...]:
        """List the members that are kernels or tables: those at a site of the graph.

        Biases and norm scales go along with a unit, and their size says nothing about it: a
        scale of 1 and a bias of 0 are as good as none, whatever the kernel holds. Of experts, and
        of groups without any site, all leaves count: an expert is a whole slice of each.

        Args:
            group: One of the groups.

        Returns:
            The members.
        """
        learned = self.learned[group.name]
        if group.role == "experts":
            return learned
        return tuple(m for m in learned if m.produces or m.reads) or learned

    def array(self, member: Member) -> jax.Array:
        """Give a member's leaf in float32, in which everything is scored.

        Args:
            member: A member of one of the groups.

        Returns:
            The array.

        Raises:
            ArgumentTypeError: If it is a shape only.
        """
        leaf = self.leaves[member.path]
        if isinstance(leaf, jax.ShapeDtypeStruct):
            raise ArgumentTypeError(
                "params",
                got=f"a shape only at {member.path!r}",
                expected="arrays",
                fix="Only structured.Random scores shapes.",
            )
        return jnp.asarray(leaf).astype(jnp.float32)

    def need(self, method: "Method", *names: str) -> None:
        """Refuse to go on without some of `fn`, `batches` and `loss`; "fn or loss" takes either.

        Args:
            method: Which asks.
            *names: What it needs.

        Raises:
            ArgumentError: If one was not given.
        """
        for name in names:
            if all(getattr(self, one) is None for one in name.split(" or ")):
                raise ArgumentError(
                    name.split(" or ")[-1],
                    got="None",
                    expected=f"{name}, which {type(method).__name__} needs",
                    fix="Call importance(groups, params, method=..., fn=fn, batches=batches), "
                    "with a loss(params, *inputs) where gradients are taken.",
                )


class Method(abc.ABC):
    """How much each unit of a group would be missed; the lowest scores go first.

    Write your own by giving `parts`, the scores of the units of a group by member, none negative
    and each of shape `(*group.layers, group.size)`; see `structured/importance/_magnitude.py`.

    Attributes:
        joint: Whether there is one part, since it takes the members of a group together.
    """

    joint: ClassVar[bool] = False

    def prepare(self, given: Given) -> Any:
        """Compute what all groups share, such as statistics over batches.

        Args:
            given: What `importance` was given.

        Returns:
            Anything: it is handed to `parts`.
        """
        del given

    @abc.abstractmethod
    def parts(self, group: Group, given: Given, prepared: Any) -> list[ArrayLike]:
        """Score the units of a group by each member that counts.

        Args:
            group: The group.
            given: What `importance` was given.
            prepared: From `prepare`.

        Returns:
            One array `(*group.layers, group.size)` per member, or one for all if `joint`.
        """

    def finish(self, scores: jax.Array) -> jax.Array:
        """Change the scores of a group after everything else.

        Args:
            scores: `(*group.layers, group.size)`, normalised.

        Returns:
            Scores of that shape.
        """
        return scores
