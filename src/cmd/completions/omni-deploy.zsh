#compdef omni-deploy deploy-manifest deployer
_omni-deploy() {
    local -a found
    local line word meaning files=0
    for line in "${(@f)$(omni-deploy completions --complete -- "${(@)words[1,CURRENT]}" 2>/dev/null)}"; do
        if [[ $line == :files ]]; then
            files=1
        elif [[ -n $line ]]; then
            # A word, and after a tab what it means, if that is said.
            word=${line%%$'\t'*} meaning=${line#"$word"}
            found+=("${word//:/\\:}${meaning:+:${meaning#$'\t'}}")
        fi
    done
    (( $#found )) && _describe -V omni-deploy found
    if (( files )); then
        compset -P '--*='
        _files
    fi
    return 0
}
if [[ $funcstack[1] == _omni-deploy ]]; then
    _omni-deploy "$@"
else
    compdef _omni-deploy omni-deploy deploy-manifest deployer
fi
