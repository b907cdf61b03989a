"""Evidence about labels that has not seen them: activations of a network, a leave-one-out readout, neighbours."""
