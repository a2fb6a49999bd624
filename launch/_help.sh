# Sourced first by the scripts here, with their arguments: --help prints the comment at their head.
if [[ "${1:-}" =~ ^(-h|--help)$ ]]; then
  sed -n '2,/^[^#]/s/^# \{0,1\}//p' "${BASH_SOURCE[1]}"
  exit
fi
