"""Faults of a training run that is taken again: its steps, its derivative, its record, what is said of it."""

from __future__ import annotations

from fault import Fault

FAULTS = (
    Fault(
        name="replay-sign",
        file="scores.py",
        old="return -slopes",
        new="return 1 * slopes",
        why="helpful and harmful are swapped under replay",
        tests=("test_at_a_minimum_it_is_influence_by_the_exact_hessian_and_leaving_one_out",),
    ),
    Fault(
        name="replay-adam-moment",
        file="rule.py",
        old="+ 2 * (1 - self.second) * g * v_",
        new="+ (1 - self.second) * g * v_",
        why="half of the way through Adam's second moment is lost",
        tests=("test_replay_is_the_derivative_of_whole_trainings",),
    ),
    Fault(
        name="replay-clip",
        file="rule.py",
        old="scale * (vectors - along * gradient)",
        new="scale * vectors",
        why="clipping is taken for a constant factor",
        tests=("test_replay_is_the_derivative_of_whole_trainings",),
    ),
    Fault(
        name="replay-averages",
        file="network.py",
        old="= 1 - momentum_of(norm)",
        new="= 1.0",
        why="running averages of BatchNorm never forget",
        tests=("test_batch_norm_dropout_and_augmentation_are_part_of_it",),
    ),
    Fault(
        name="replay-divisor",
        file="backward.py",
        old="(inner / len(rows))",
        new="(inner / run.examples)",
        why="an image weighs 1/n in its batch",
        tests=("test_replay_is_the_derivative_of_whole_trainings",),
    ),
    Fault(
        name="replay-trust",
        file="verdict.py",
        old="return self.agreement >= TRUST",
        new="return self.agreement >= CHAOTIC",
        why="numbers are trusted that are right in part",
        tests=("test_the_sentence_follows_the_agreement",),
    ),
    Fault(
        name="replay-state-checksum",
        file="states.py",
        old='bool(file.attrs["checksum"] == checksum(vectors))',
        new='bool(file.attrs["checksum"])',
        why="a damaged state goes into every number",
        tests=("test_a_damaged_state_is_named_and_no_number_comes_of_it",),
    ),
    Fault(
        name="recipe-order",
        file="recipe.py",
        old="np.random.default_rng([seed, ORDER, epoch])",
        new="np.random.default_rng([seed, ORDER])",
        why="every epoch has the same order",
        tests=("test_every_epoch_takes_every_example_once_in_another_order",),
    ),
    Fault(
        name="few-products-directions",
        file="cg.py",
        old="p = z + torch.where(moving, slope / torch.where(moving, last, 1.0), 0.0)[:, None] * p",
        new="p = z",
        why="three products are three steps of steepest descent",
        tests=("test_they_are_those_of_the_textbook_whatever_is_solved_along",),
    ),
    Fault(
        name="preconditioner-without-l2",
        file="iterative.py",
        old="if isinstance(moved, Tensor) and float(moved.min()) > 0:",
        new="if isinstance(moved, Tensor):",
        why="where a bias has no l2, every influence is 0",
        tests=("test_l2_by_parameter_gives_the_answer_of_a_dense_solve",),
    ),
)
