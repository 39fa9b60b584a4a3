"""What a student learns from its teacher's logits.

In all functions: logits are (N, C, …), finite, class dimension 1, further dimensions are tokens; `temperature` > 0;
p = softmax(teacher / T), q = softmax(student / T); logarithms are natural. A loss returns (N, …), one value per sample
or token, summed over classes, in float32 or wider whatever comes in. InputError is raised if the shapes of student and
teacher differ.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from compressor.distillation.pairs import match_shapes, widen
from compressor.errors import InputError
from compressor.task import IGNORED


def distillation_loss(
    student_logits: Tensor, teacher_logits: Tensor, *, temperature: float, temperature_squared: bool = True
) -> Tensor:
    """Divergence of the student's softened classes from the teacher's, times T² so that gradients keep their size.

    T² · KL(p ‖ q), Hinton et al. 2015 (arXiv 1503.02531), summed over classes; `temperature_squared=False` leaves T²
    out. Returns (N, …), in nats.
    """
    student, teacher = _log_probabilities(student_logits, teacher_logits, temperature)
    return _scale(temperature, temperature_squared) * _divergence(teacher, student)


def soft_cross_entropy(
    student_logits: Tensor, teacher_logits: Tensor, *, temperature: float, temperature_squared: bool = True
) -> Tensor:
    """Cross-entropy of the student under the teacher's softened classes: `distillation_loss` plus T² · H(p).

    -T² · Σ_c p_c log q_c; `temperature_squared=False` leaves T² out. Returns (N, …), in nats. With a fixed teacher its
    gradients are those of `distillation_loss`.
    """
    student, teacher = _log_probabilities(student_logits, teacher_logits, temperature)
    return -_scale(temperature, temperature_squared) * (teacher.exp() * student).sum(dim=1)


def reverse_distillation_loss(
    student_logits: Tensor, teacher_logits: Tensor, *, temperature: float, temperature_squared: bool = True
) -> Tensor:
    """Divergence of the teacher from the student, which lets a small student leave out what it cannot hold.

    T² · KL(q ‖ p), Gu et al. 2024 (MiniLLM, arXiv 2306.08543); `temperature_squared=False` leaves T² out. Returns
    (N, …), in nats.
    """
    student, teacher = _log_probabilities(student_logits, teacher_logits, temperature)
    return _scale(temperature, temperature_squared) * _divergence(student, teacher)


def jensen_shannon_loss(
    student_logits: Tensor, teacher_logits: Tensor, *, beta: float, temperature: float, temperature_squared: bool = True
) -> Tensor:
    """Divergence of both from their mixture: bounded, so that a teacher that is far away does not dominate.

    T² · (beta · KL(p ‖ m) + (1 - beta) · KL(q ‖ m)) with m = beta p + (1 - beta) q, Agarwal et al. 2024 (GKD, arXiv
    2306.13649). 0 < `beta` < 1; 0.5 is symmetric, and divided by beta the loss tends to KL(p ‖ q) as beta → 0. At most
    T² · log 2. `temperature_squared=False` leaves T² out. Returns (N, …), in nats.
    """
    student, teacher = _log_probabilities(student_logits, teacher_logits, temperature)
    mixture = torch.logaddexp(teacher + math.log(beta), student + math.log1p(-beta))
    loss = beta * _divergence(teacher, mixture) + (1 - beta) * _divergence(student, mixture)
    return _scale(temperature, temperature_squared) * loss


def decoupled_distillation_loss(
    student_logits: Tensor, teacher_logits: Tensor, targets: Tensor, *, alpha: float, beta: float, temperature: float
) -> Tensor:
    """`distillation_loss` in two parts, each with its weight: target against the rest, and the rest among themselves.

    T² · (alpha · KL(b_p ‖ b_q) + beta · KL(p̂ ‖ q̂)) with b_p = (p_y, 1 - p_y) and p̂ = p without class y, renormalised,
    Zhao et al. 2022 (DKD, arXiv 2203.08679, eq. 7). alpha = 1 and beta = 1 - p_y would give `distillation_loss`.
    C >= 2. `targets`: (N, …) classes in [0, C); where a target is -100 the loss is 0 and has no gradient, whatever the
    logits are. Returns (N, …), in nats.
    """
    student, teacher = match_shapes(student_logits, teacher_logits)
    ignored = (targets == IGNORED).unsqueeze(1)
    classes = targets.unsqueeze(1).masked_fill(ignored, 0)
    is_target = torch.zeros_like(student, dtype=torch.bool).scatter(1, classes, value=True)
    # Equal logits have loss 0; masking them here, not the result, also keeps the gradients of NaN and inf out.
    student_margin, student_rest = _decouple(student.masked_fill(ignored, 0) / temperature, is_target)
    teacher_margin, teacher_rest = _decouple(teacher.masked_fill(ignored, 0) / temperature, is_target)
    target_part = _divergence(_binary(teacher_margin), _binary(student_margin))
    rest_part = _divergence(teacher_rest, student_rest)
    return temperature**2 * (alpha * target_part + beta * rest_part)


def correlation_loss(
    student_logits: Tensor, teacher_logits: Tensor, *, inter: float, intra: float, temperature: float
) -> Tensor:
    """How little the student's probabilities correlate with the teacher's, over classes and over samples.

    T² · (inter · (1 - rho over the classes of a sample) + intra · mean over classes of (1 - rho over the samples)) with
    Pearson's rho, Huang et al. 2022 (DIST, arXiv 2205.10536). Tokens are samples like any other. The intra part is a
    value of the whole batch, given to every sample: it depends on how the data is cut into batches. Where either side
    does not vary, as over a single sample, rho is 0 without gradient. Returns (N, …), in [0, 2 T² (inter + intra)].
    """
    student, teacher = match_shapes(student_logits, teacher_logits)
    student, teacher = F.softmax(student / temperature, dim=1), F.softmax(teacher / temperature, dim=1)
    samples = (0, *range(2, student.ndim))
    over_classes = 1 - _correlation(student, teacher, (1,))
    over_samples = 1 - _correlation(student, teacher, samples)
    return temperature**2 * (inter * over_classes + intra * over_samples.mean())


def standardize(logits: Tensor) -> Tensor:
    """Logits with mean 0 and standard deviation 1 over the classes, so that a student learns shape and not size.

    (z - mean) / (1e-7 + std), std with C - 1 in the denominator, Sun et al. 2024 (arXiv 2403.01427). `logits`:
    (N, C, …), C >= 2; the same shape is returned. Gradients are divided by std: logits that are all equal, as a zero
    head gives them, get 1e7 times the gradient.
    """
    logits = widen(logits)
    return (logits - logits.mean(dim=1, keepdim=True)) / (1e-7 + logits.std(dim=1, correction=1, keepdim=True))


def logit_mse(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Squared difference of the logits, averaged over classes, Ba & Caruana 2014 (arXiv 1312.6184).

    Of logits that are centred over the classes it is the limit of 2 · `distillation_loss` as T → ∞. Returns (N, …).
    """
    student, teacher = match_shapes(student_logits, teacher_logits)
    return (student - teacher).square().mean(dim=1)


def squared_difference(student_outputs: Tensor, teacher_outputs: Tensor) -> Tensor:
    """Squared difference of each number: outputs that are values, (N, …), give (N, …)."""
    student, teacher = match_shapes(student_outputs, teacher_outputs)
    return (student - teacher).square()


class TopClasses(NamedTuple):
    """A teacher's k most probable classes and what is left, in log-probabilities at T = 1; classes are int64."""

    log_probabilities: Tensor  # (N, k, …), descending
    classes: Tensor  # (N, k, …)
    tail: Tensor  # (N, …), of all other classes together


def top_k(logits: Tensor, k: int) -> TopClasses:
    """Return the `k` most probable classes of `logits` (N, C, …): what is stored of a teacher with many classes.

    Raises InputError unless 1 <= k < C: k = C leaves no tail; keep the logits instead.
    """
    if not 1 <= k < logits.shape[1]:
        msg = f"top classes must number at least 1 and less than all {logits.shape[1]}, got {k!r}"
        raise InputError(msg)
    log_probabilities = F.log_softmax(widen(logits), dim=1)
    top, classes = log_probabilities.topk(k, dim=1)
    return TopClasses(top, classes, _tail(log_probabilities, classes))


def tail_bucket_loss(student_logits: Tensor, teacher: TopClasses) -> Tensor:
    """KL(p ‖ q) at T = 1 over k + 1 buckets: the teacher's k top classes, and all other classes as one.

    At most `distillation_loss` at T = 1, and close to it if the tail holds little. Unlike a renormalised top k it is
    lowest at q = p. Returns (N, …), in nats.
    """
    student = F.log_softmax(widen(student_logits), dim=1)
    top = _divergence(widen(teacher.log_probabilities), student.gather(1, teacher.classes))
    tail = widen(teacher.tail)
    return top + tail.exp() * (tail - _tail(student, teacher.classes))


def _log_probabilities(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    student, teacher = match_shapes(student_logits, teacher_logits)
    return F.log_softmax(student / temperature, dim=1), F.log_softmax(teacher / temperature, dim=1)


def _divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(dim=1)


def _scale(temperature: float, temperature_squared: bool) -> float:
    return temperature**2 if temperature_squared else 1.0


def _decouple(logits: Tensor, is_target: Tensor) -> tuple[Tensor, Tensor]:
    """Return log(p_y / (1 - p_y)) as (N, …), and log p̂ as (N, C, …), where class y holds 0 and so adds nothing."""
    rest = logits.masked_fill(is_target, -math.inf)
    margin = logits.masked_fill(~is_target, 0).sum(dim=1) - torch.logsumexp(rest, dim=1)
    return margin, F.log_softmax(rest, dim=1).masked_fill(is_target, 0)


def _binary(margin: Tensor) -> Tensor:
    # log p_y and log(1 - p_y) from their log-odds: neither rounds to log(0), however sure the model is.
    return torch.stack((F.logsigmoid(margin), F.logsigmoid(-margin)), dim=1)


def _correlation(first: Tensor, second: Tensor, dim: tuple[int, ...]) -> Tensor:
    """Pearson's rho of probabilities over `dim`, with the 1e-8 that DIST's authors add to the denominator."""
    first, second = first - first.mean(dim, keepdim=True), second - second.mean(dim, keepdim=True)
    first_norm: Tensor = torch.linalg.vector_norm(first, dim=dim)
    second_norm: Tensor = torch.linalg.vector_norm(second, dim=dim)
    correlation = (first * second).sum(dim) / (first_norm * second_norm + 1e-8)
    # A constant of at most 1 leaves no more than this by rounding; its gradient would be up to 1e8 in no direction.
    rounding = torch.finfo(first.dtype).eps * math.sqrt(first.numel() / first_norm.numel())
    return correlation.masked_fill((first_norm <= rounding) | (second_norm <= rounding), 0)


def _tail(log_probabilities: Tensor, classes: Tensor) -> Tensor:
    # Summing what is left, not 1 - the sum of the top, keeps all digits of a tail that is smaller than rounding.
    return torch.logsumexp(log_probabilities.scatter(1, classes, -math.inf), dim=1)
