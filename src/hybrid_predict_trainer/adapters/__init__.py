"""Drivers of the engine for the frameworks that people train in; each imports its framework when it is imported itself.

`hf` (transformers.Trainer, TRL), `accelerate`, `lightning` (Trainer and Fabric).  Nothing here moves a weight: every
adapter only calls the stations of :class:`~hybrid_predict_trainer.Engine`, in the order that its framework has.
"""
