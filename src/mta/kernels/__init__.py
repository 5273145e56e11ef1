"""Compiled CPU kernels for the operations between the matrix products; used where they can be compiled.

``compile`` builds and loads the kernels, ``functions`` adds gradients, ``swap`` puts the kernels into a model.
"""
