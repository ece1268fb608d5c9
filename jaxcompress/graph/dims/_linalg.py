"""How labels go through linear algebra: batches of matrices, each taken whole."""

from jaxcompress.graph.dims._rule import Axes, Step, register_dims

_VECTORS = frozenset({"lu_pivots_to_permutation"})


@register_dims(
    "cholesky", "eig", "eigh", "geqp3", "geqrf", "hessenberg", "householder_product", "lu",
    "lu_pivots_to_permutation", "ormqr", "qr", "schur", "svd", "tridiagonal",
)  # fmt: skip
class _Factorize:
    def follow(self, step: Step) -> list[Axes]:
        count = len(step.operands[0]) - (1 if step.name in _VECTORS else 2)
        batch = step.operands[0][:count]
        for axes in step.operands:
            for a, b in zip(batch, axes, strict=False):
                step.labels.unify(a, b)
            step.labels.freeze_all(axes[count:], f"{step.name} needs the whole matrix")
        results = []
        for axes in step.fresh():
            step.labels.freeze_all(axes[count:], f"{step.name} makes it")
            results.append((*batch, *axes[count:]))
        return results


@register_dims("triangular_solve", "tridiagonal_solve")
class _Solve:
    """Solves for the last operand: each column (or row, on the other side) by itself."""

    def follow(self, step: Step) -> list[Axes]:
        *matrix, right = step.operands
        count = len(right) - 2
        solved = count if step.params.get("left_side", True) else count + 1
        for axes in matrix:
            for a, b in zip(right[:count], axes, strict=False):
                step.labels.unify(a, b)
            step.labels.freeze_all(axes[count:], f"{step.name} needs the whole matrix")
        step.labels.freeze(right[solved], f"{step.name} solves along it")
        return [right]
