"""The head op on softmaxes of a trained model; the rest of its benchmark is in fastdpo/evidence/bench/heads."""
