"""The mathematics: schedules, predictions, denoisers, guidance, samplers, losses. Torch and numpy alone."""
