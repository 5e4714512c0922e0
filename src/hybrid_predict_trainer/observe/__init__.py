"""What is observed of real steps.

Reading order: `batches` and `same_batch` (size and pieces of a batch; is it the one before), `recurrence` (do data come
round again), `history` (losses and norms), `loss_features` (numbers of a loss curve), `basis` (window means,
displacements, their inner products), `kfac`, `encoder` and `window_encoder` (encoded state), `gradient_health`,
`divergence` (signals).
"""
