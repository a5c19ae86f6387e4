"""The table of the algorithms that learn in step 1 which layers a subnet keeps.

A new algorithm is one module and one entry here. Its module has:

    DEFAULTS                  its values of `delta`, `initial_score`, `score_rate`, if it has them
    initial_scores(config)    the layer scores before the first update
    size_at(update, config)   the subnet's number of layers, which also chooses its output layer
    shown_size(size, config)  the same as a line of the log shows it: `target 5`
    layer_weights(scores, ranking, update, config)   the L gates of that subnet
    extra_loss(scores, ranking, update, config)      what is added to the two CTC losses
    rank(scores, ranking, update, config)            the layers, most important first
    needs_ranking(update, config)                    whether `rank` must run after this update,
                                                     for the layer weights of the next one

`update` is the number of an update of step 1, from 0. `ranking` is the last one that was kept, at
first the layers in their order. `rank` also runs at the end of step 1 and before a checkpoint or a
validation, and for a line of the log, which does not keep its result. No function but `rank` waits
for the device.
`size_at` is below L. The scores are (L,) or (L, L). A module imports `Config` for type checking
alone, as config.py imports this table.
"""

from types import ModuleType

from dynsize import iterative_zero_out, ortho_softmax, simple_top_k

ALGORITHMS: dict[str, ModuleType] = {
    "simple-top-k": simple_top_k,
    "iterative-zero-out": iterative_zero_out,
    "ortho-softmax": ortho_softmax,
}
