int two();
int one() { return two(); }
