"""Networks written once: a program of steps runs in compiled loops with derivatives, or as its PyTorch definition.

- :mod:`torchmdnet.tape.tape`: steps, the tape that runs them and its four passes.
- :mod:`torchmdnet.tape.steps`: steps that most networks consist of.
- :mod:`torchmdnet.tape.geometry`: the edges of one graph as compiled loops read them.
- :mod:`torchmdnet.ops.workspace`: buffers whose memory is used again.
"""
