"""The models and the data of the demos."""
