"""All planted faults, by theme: estimates, layers, the store, what is read, what is written, what judges, reports."""

from __future__ import annotations

import faults_checks
import faults_estimates
import faults_input
import faults_layers
import faults_output
import faults_replay
import faults_situations
import faults_store

FAULTS = (
    *faults_estimates.FAULTS,
    *faults_layers.FAULTS,
    *faults_store.FAULTS,
    *faults_input.FAULTS,
    *faults_output.FAULTS,
    *faults_checks.FAULTS,
    *faults_replay.FAULTS,
    *faults_situations.FAULTS,
)
