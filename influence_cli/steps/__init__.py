"""Steps of training as functions of flat vectors: taken, taken again without some examples, and gone back through.

Start with ``rule`` (one step of an optimiser), ``network`` (what a batch gives), ``run`` (what a run is), then
``backward``.
"""
