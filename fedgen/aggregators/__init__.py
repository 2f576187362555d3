"""Server mathematics: pure functions of arrays that know nothing of federation."""
