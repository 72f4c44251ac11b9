"""The two experiments of Rombach et al. 2022 (arXiv:2112.10752), figures 6 and 7, on one's own data and runs."""
