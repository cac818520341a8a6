# bash completion for omni-deploy, deploy-manifest and deployer
# bash has taken the line apart also at each = and :, and replaces what is after the last of them.
_omni_deploy() {
    local line word cur=${COMP_WORDS[COMP_CWORD]} rest=${COMP_LINE:0:COMP_POINT} files= words=()
    for word in "${COMP_WORDS[@]:0:COMP_CWORD+1}"; do
        if [[ $words && $rest && $rest != [[:space:]]* ]]; then
            words[-1]+=$word
        else
            words+=("$word") rest=${rest#"${rest%%[![:space:]]*}"}
        fi
        rest=${rest#"$word"}
    done
    [[ $cur == [=:] ]] && cur=
    word=${words[-1]} COMPREPLY=()
    while IFS= read -r line; do
        if [[ $line == :files ]]; then files=1; continue; fi
        line=${line%%$'\t'*}
        COMPREPLY+=("${line#"${word%"$cur"}"}")
    done < <(omni-deploy completions --complete -- "${words[@]}" 2>/dev/null)
    if [[ $files ]]; then
        compopt -o filenames
        while IFS= read -r line; do COMPREPLY+=("$line"); done < <(compgen -f -- "$cur")
    fi
}
complete -F _omni_deploy omni-deploy deploy-manifest deployer
