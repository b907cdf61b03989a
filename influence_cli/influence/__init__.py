"""Scores and their sign.

``scores`` holds the formulas, ``inverse`` applies (H + λI)⁻¹, ``streams`` scores all training examples piece by piece.
"""
