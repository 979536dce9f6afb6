fn main() {
    sockless::sandbox::hidden_command();
}
