"""Whether a loss is one of labels: it has no minimum but at infinite weights, once a network knows all labels by heart.

A jump that is judged by the training loss goes there as fast as it can, and so does a larger step.  Unless samples are
many nothing in the training loss tells that from learning: full-batch cross-entropy on 1,000 images ended at four times
the plain run's validation loss (LOG.md).  What the loss is made of is read off the names of its autograd nodes.
"""

from __future__ import annotations

from collections import deque
from typing import Any

from torch import Tensor

#: Nodes of losses of labels, by the beginnings of their names: cross-entropy in both forms, also written by hand.
LABELS = ("NllLoss", "BinaryCrossEntropy", "LogSoftmax", "LogSigmoid", "Logsumexp", "CtcLoss", "SoftMarginLoss")
#: Nodes that measure how large something is; of a weight it is a penalty.
SIZES = ("PowBackward", "MulBackward", "AbsBackward", "LinalgVectorNorm", "NormBackward")
#: Nodes that weigh, pick, add up or reshape what comes from before them.
PASSED = (
    "Mean", "Sum", "Mul", "Div", "Add", "Sub", "Neg", "Exp", "Clamp", "Squeeze", "Unsqueeze", "View", "Reshape",
    "UnsafeView", "Alias", "Clone", "ToCopy", "Select", "Slice", "Index", "IndexSelect", "Gather", "MaskedSelect",
    "MaskedFill", "Where", "Expand", "Stack", "Cat", "Transpose", "Permute", "T", "Dot",
)  # fmt: skip
#: At the minimum of the training loss p weights fitted to n labels are p / 2n nats of each above the best there is (the
#: expansion behind Akaike's criterion, 1974): with so many samples per weight that is a hundredth.
SAMPLES_PER_WEIGHT = 50
#: Nodes that are looked at: the losses themselves lie before the network.
MOST_NODES = 64


def is_of_labels(loss: Tensor) -> bool:
    """Whether a loss is the mean, or any weighted sum, of losses of labels.

    With a penalty of weights in the loss it has a minimum, as with decay: such a one is no loss of labels here.

    Args:
        loss: Shape (), with its graph; backward may have been through it.  Without a graph nothing is known: no.
    """
    if loss.grad_fn is None:
        return False
    waiting, seen, found = deque([loss.grad_fn]), 0, False
    while waiting and seen < MOST_NODES:
        node, seen = waiting.popleft(), seen + 1
        name = name_of(node)
        if name.startswith(LABELS):
            found = True
        elif name.startswith(SIZES) and is_of_a_weight(node) and (not name.startswith("Mul") or is_a_square(node)):
            return False
        elif name.partition("Backward")[0] in PASSED:
            waiting.extend(before for before, _ in node.next_functions if before is not None)
    return found


def name_of(node: Any) -> str:
    """What torch calls the node of a graph."""
    return str(node.name()).removeprefix("torch::autograd::")


def is_a_square(node: Any) -> bool:
    """Whether a product is one of something with itself."""
    (left, _), (right, _) = node.next_functions
    return left is not None and left is right


def is_of_a_weight(node: Any) -> bool:
    """Whether a node's input is a parameter itself."""
    before = node.next_functions[0][0]
    return before is not None and name_of(before).startswith("AccumulateGrad")
