"""Several processes, each with a whole model, that score, evaluate or compensate together and decide alike.

They are the processes of a group of ``torch.distributed``, initialised by the caller, one to a GPU. All call
:func:`gisp.prune` with the same model, data and options, and each gets the pruned model. The first one alone writes the
run folder. The run is the one that a single process makes with as many ``slices``, bit for bit, on GPUs of one kind.

Where a process fails the others raise :class:`gisp.replicas.errors.ReplicaError`. One that cannot, because it waits for
a process that is gone, is ended with exit code 2 after one line on standard error.
"""
