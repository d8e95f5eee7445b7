"""Guides to read and to run: ``python -m learnsched.guides.NAME [--quick]``.

- ``use_in_your_loop``: quantize a model, train it under a learned schedule, resume, finish;
- ``train_your_own``: meta-train a schedule on tasks of your choice and use it;
- ``add_your_own``: a policy, a level set, data and a kind of network that the package does not have.
"""
