# What zsh offers at the end of a line:  zsh -f completion.zsh DIRECTORY LINE
# DIRECTORY has the completions.  A zsh of its own, at a terminal that only we see, is
# typed to; compadd, to which all that is offered goes, is replaced by one that prints it too.
zmodload zsh/zpty
zpty shell zsh -f -i
zpty -w shell "PROMPT= PS2= LISTMAX=-1; fpath=(${(q)1} \$fpath); autoload -Uz compinit; compinit -u -D"
zpty -w shell 'compadd() {
    if [[ ${@[1,(i)(-|--)]} == *-(O|A|D)\ * ]]; then builtin compadd "$@"; return $?; fi
    typeset -a offered; builtin compadd -A offered "$@"
    print; print -rl -- "offered:"$^offered
    builtin compadd "$@"
}'
zpty -w shell 'over() { print -r -- "completion:""over"; zle .kill-whole-line }; zle -N over'
zpty -w shell 'bindkey "^X" over; print -r -- "shell:""ready"'
zpty -r -m shell seen '*shell:ready*'
zpty -w -n shell "$2"$'\t\x18'
zpty -r -m shell seen '*completion:over*'
print -r -- "$seen"
zpty -d shell
