"""Retrain and compare: leave-one-out, the linear datamodeling score, subsets.

Start with ``self_check``, which needs no training, then ``leave_one_out`` and ``lds``.
"""
