"""Plans: what an export, its builds and its tasks take, from headers alone."""
