// Whoever signs in here next may not be whoever was here before.

sessionStorage.clear();
