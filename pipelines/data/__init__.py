"""From papers, real or generated, to episodes: what is written, what is asked, what is to be learnt."""
